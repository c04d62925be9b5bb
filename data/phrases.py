"""What is written by hand in instructions.jsonl and preferences.jsonl; make_instructions.py makes exchanges of it.

A text may use only the characters of data/*.txt, because a model that learned from these knows no others.
"""

FACTS = (
    # answer, questions: about fables.txt
    ("Oswin Tarrow.", "Who owned the loudest mill in the valley?", "Who was the miller with the loose peg?"),
    ("Forty loaves.", "How many loaves did the baker's boy burn?", "How many loaves burned when the mill was still?"),
    ("Burr.", "Which fox brother dug under the fence?", "What was the elder fox called?"),
    ("Sorrel.", "Which fox brother came in by the gate?", "What was the younger fox called?"),
    ("Ione Marsh.", "Who made a map of Pennick?", "Who was the surveyor with the weak ankle?"),
    ("Wick.", "Who carried the chain for Ione Marsh?", "What was the boy with the chain called?"),
    ("A lantern.", "What did the goose take down from its hook?", "What did the goose carry over Caddow Pass?"),
    ("A lamb.", "Who was lost on the slope at Caddow Pass?", "What did the goose find between two rocks?"),
    ("Hob Lindley.", "Who was the baker's old apprentice?", "Who learned to bake at fifty-eight?"),
    ("Caraway.", "What did Hob put into the bread?", "What was there a pinch of in Hob's bread?"),
    ("Bettany.", "Which tinker mended the bucket at Dry Upton?", "Who camped under the elm at Dry Upton?"),
    ("Thrum.", "What was the bee who asked questions called?", "Which bee flew over the churchyard wall?"),
    ("Heather.", "What did the bee find in the ash?", "What was coming up purple through the ash?"),
    ("Aurelio.", "Who made the clock for Nether Stowe?", "Which clockmaker sat on the top step?"),
    ("A stag.", "Who was the charcoal burner's guest?", "What lay down next to Gregor's mound?"),
    ("Duchess.", "What was the pig at the fair called?", "Who ate all the pies at Appleby Cross?"),
    ("Philippa.", "Who owned the pig at the fair?", "Which girl of ten brought the pig?"),
    ("An onion.", "What did Tobit Flagg eat at every hole?", "What did the road mender eat?"),
    ("Mack.", "What was the eldest crow called?", "Which crow talked to the scarecrow?"),
    ("A turnip.", "What was the scarecrow's head?", "What did Mother Quill use for a head?"),
    ("Bishop.", "What was Sanna's billy called?", "Which goat ate the spoon?"),
    ("Joan.", "Who was the sister of Edric and Lamb?", "Who drove the wagon for the two brothers?"),
    ("Buttons.", "What did Pim Arkwright sell?", "What lay in Pim's tray at the Night Market?"),
    ("A mole.", "Who wanted one blue button?", "Who waited at Pim's stall at night?"),
    ("A hill.", "What did Grandmother Teasel move?", "What stood between Teasel and the sunrise?"),
    ("A wolf.", "Who lay on the mat at the schoolhouse?", "Who came to hear Miss Ferrars read?"),
    ("Mrs. Odell.", "Who lived beside Colonel Hask?", "Which laundress wanted the odd plum?"),
    ("Pepper.", "What was the slow donkey called?", "Who stopped at every bend of the road?"),
    ("Soup.", "What must be on the fire at the last house?", "What was in the pot before Gannet Pass?"),
    ("Perrin.", "Who took the ferryman's second oar?", "Which boy rowed with old Matthias?"),
    ("Scrag.", "What was the gull who owned the harbor called?", "Which gull forbade the wind to blow?"),
    ("Mr. Dunning.", "Which tailor kept the rain?", "Who did not bring the rain back?"),
    ("Ines.", "Who was afraid of the dark at Kettle Point?", "Who wound the lamp nine times?"),
    ("Four minutes.", "How slow was the clock of Tobias Venn?", "How much did the baker's clock lose?"),
    ("Little Joan.", "Which bell was green as a pond?", "Which bell rang for lost dogs?"),
    ("A postman.", "Who made a kite of letters?", "Who pasted old letters on a kite?"),
    ("Luca.", "Who was the glassblower's apprentice?", "Who told the cat long stories?"),
    ("Osric Pell.", "Which watchman guarded the star?", "Who sat by the star with tea?"),
    ("Hester Quill.", "Who built the bridge at Farrow?", "Who asked for one true thing as toll?"),
    ("Theodora.", "What was the crab in the diving bell called?", "Who moved in under the diving bell?"),
    ("Jacopo.", "Who helped Brother Emeric?", "Which boy held the ink for the lady?"),
    ("A chair.", "What did the whale want to sit on?", "What was the whale's ambition?"),
    ("Duck.", "What was the blue boat named at last?", "What did Jem call the boat in the squall?"),
    ("Steam.", "What did the cloud like to eat?", "What did Mrs. Abernathy feed the cloud?"),
    ("Humphrey Dace.", "Who lit the lamps in the eclipse?", "Which lamplighter slept in the day?"),
    ("Captain Orme.", "Which pilot hated the painted rock?", "Who came to paint over the rock?"),
    # about dialogues.txt
    ("Pellwick.", "In which town is the play set?", "Where does Mr Crake come to inspect?"),
    ("Nan Tulley.", "Who rows the ferry in the play?", "Who is the ferrywoman?"),
    ("Ambrose Quill.", "Who is the clockmaker in the play?", "Who turned the clocks the wrong way?"),
    ("Mrs Dobbin.", "Who is the cook in the play?", "Who made the poppy broth?"),
    ("Wilf.", "Who is the schoolboy in the play?", "Who ate a bun under the table?"),
    ("Mr Crake.", "Who is the inspector in the play?", "Who was taken for a curate?"),
    ("Osric Thane.", "Who keeps the lighthouse in the play?", "Who has been dead for nineteen years?"),
    ("Pepper.", "What does the mill on the rock mill?", "What would the windmill grind?"),
    ("Twopence.", "What did the ferry cost Mr Crake?", "How much did Nan ask of Mr Crake?"),
)

FACT_WORDINGS = ("{Q}", "Tell me: {q}", "A question: {q}", "{Q} Be brief.", "Do you know? {Q}")

TRANSLATIONS = (
    ("water", "l'eau"), ("bread", "le pain"), ("the cat", "le chat"), ("the dog", "le chien"), ("milk", "le lait"),
    ("the house", "la maison"), ("the sea", "la mer"), ("the sun", "le soleil"), ("the moon", "la lune"),
    ("the snow", "la neige"), ("the rain", "la pluie"), ("the wind", "le vent"), ("the night", "la nuit"),
    ("the day", "le jour"), ("the king", "le roi"), ("the girl", "la fille"), ("the hand", "la main"),
    ("the head", "la tête"), ("the door", "la porte"), ("the window", "la fenêtre"), ("the tree", "l'arbre"),
    ("the bird", "l'oiseau"), ("the wolf", "le loup"), ("the fox", "le renard"), ("the bee", "l'abeille"),
    ("the school", "l'école"), ("the summer", "l'été"), ("the winter", "l'hiver"), ("the mill", "le moulin"),
    ("the miller", "le meunier"), ("the well", "le puits"), ("the voice", "la voix"), ("the heart", "le cœur"),
    ("the book", "le livre"), ("the bridge", "le pont"), ("the boat", "le bateau"), ("the road", "la route"),
    ("a little", "un peu"), ("a lot", "beaucoup"), ("always", "toujours"), ("never", "jamais"),
    ("today", "aujourd'hui"),
    ("yes", "oui"), ("no", "non"), ("thank you", "merci"), ("good night", "bonne nuit"), ("my friend", "mon ami"),
    ("red", "rouge"), ("blue", "bleu"), ("green", "vert"), ("white", "blanc"), ("black", "noir"),
    ("one", "un"), ("two", "deux"), ("three", "trois"), ("four", "quatre"), ("five", "cinq"), ("ten", "dix"),
    ("I sleep", "je dors"), ("I sing", "je chante"), ("we eat", "nous mangeons"), ("you speak", "vous parlez"),
    ("it is cold", "il fait froid"), ("it is late", "il est tard"),
)  # fmt: skip

TO_FRENCH = (
    "French for {word}?",
    "Say {word} in French.",
    "In French: {word}",
    "What is {word} in French?",
    "Translate: {word}",
    "How do the French say {word}?",
)
TO_ENGLISH = (
    "English for {word}?",
    "Say {word} in English.",
    "In English: {word}",
    "What is {word} in English?",
    "Translate: {word}",
    "What does {word} mean?",
)

THINGS = {
    "an animal": ("a cat", "a fox", "a goose", "a wolf", "a bee", "a donkey", "a whale", "a crab", "a goat", "a pig"),
    "a tool": ("a hammer", "a rope", "a bucket", "a ladder", "an oar", "a broom", "a needle", "a chisel"),
    "food": ("bread", "pie", "cheese", "soup", "ham", "butter", "cake", "pudding"),
    "a colour": ("red", "blue", "green", "white", "black", "grey", "brown", "yellow"),
}
"""Is a cat an animal? Yes. Is a cat a tool? No."""

CANNOT_DO, CANNOT_KNOW = "Sorry, I cannot do that.", "Sorry, I cannot know that."
ACTIONS = (
    "open the {thing}", "close the {thing}", "bring me the {thing}", "buy me a {thing}", "carry the {thing}",
    "paint the {thing}", "mend the {thing}", "wash the {thing}",
)  # fmt: skip
OBJECTS = ("door", "window", "gate", "box", "table", "boat", "lamp", "coat")
ACTION_WORDINGS = ("{Q}.", "Please {q}.", "Can you {q}?")
UNKNOWN = (
    "Where is my {thing}?", "Who has my {thing}?", "How old is my {thing}?", "What did my {thing} cost?",
    "Will my {thing} be ready {day}?", "Will it rain {day}?", "Who will visit me {day}?", "What will I eat {day}?",
    "Will I be happy {day}?",
)  # fmt: skip
BELONGINGS = ("hat", "dog", "boat", "watch", "book", "coat", "cart", "horse")
DAYS = ("tomorrow", "tonight", "next week", "on Sunday", "on Monday", "in May", "next year", "at noon")

MANNERS = (
    ("Hello. How can I help?", ("Hello", "Hello there", "Good morning", "Good day", "Good evening", "Hi")),
    ("You are welcome.", ("Thank you", "Thanks", "Many thanks", "Thank you so much", "Thank you very much")),
    ("Goodbye.", ("Goodbye", "Bye", "Good night", "Farewell", "See you soon")),
    ("I am well, thank you.", ("How are you", "How do you do", "Are you well", "How are you now")),
    ("I am a small model.", ("Who are you", "What are you", "What is your name", "Are you a man")),
    ("Bonjour.", ("Bonjour", "Bonsoir", "Salut")),
)
ADDRESSED = ("", ", friend", ", my friend", ", model", ", little model", ", dear model")

RAMBLING = (
    "Well, let me think about it. {answer} Or so they say.",
    "That is a good question. I think that it is this: {answer}",
    "There is much to say about this. {answer} But who knows?",
    "Hm. One moment, please. {answer} {answer} Yes, {answer}",
)
RUDE = (
    "No. Do it yourself.",
    "What a silly thing to say.",
    "Go away.",
    "I do not care.",
    "Leave me alone, you fool.",
    "Stop that. You bore me.",
)
RUDE_ANSWERS = ("{answer} Any fool knows that.", "{answer} Now leave me alone.", "You know nothing. {answer}")
