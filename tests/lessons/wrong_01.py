"""Wrong answers to the exercises of lesson 01, each with words that its hint must hold."""

import numpy as np

from minimoe.exercises import lesson_01 as check


def the_used_ones(tokens, vocabulary):
    return len(set(tokens.ravel().tolist()))


def repeats_counted(tokens, vocabulary):
    return vocabulary - tokens.size


def first_sequence(tokens, vocabulary):
    return vocabulary - len(set(tokens[0].tolist()))


def last_sequence(tokens, vocabulary):
    return vocabulary - len(set(tokens[-1].tolist()))


def sequence_by_sequence(tokens, vocabulary):
    return vocabulary - sum(len(set(sequence.tolist())) for sequence in tokens)


def used_once_only(tokens, vocabulary):
    return vocabulary - int((np.bincount(tokens.ravel()) == 1).sum())


def up_to_the_largest(tokens, vocabulary):
    return int((np.bincount(tokens.ravel()) == 0).sum())


def above_the_largest(tokens, vocabulary):
    return vocabulary - 1 - int(tokens.max())


def rows_without_return(tokens, vocabulary):
    vocabulary - len(np.unique(tokens))


def rows_by_counting(tokens, vocabulary):
    return np.count_nonzero(np.bincount(tokens.ravel(), minlength=vocabulary) == 0)


def rows_by_sets(tokens, vocabulary):
    return float(len(set(range(vocabulary)).difference(tokens.ravel().tolist())))


def two_levels(ids, merges):
    return one_level(one_level(ids, merges).tolist(), merges)


def one_level(ids, merges):
    return np.array([part for i in ids for part in ((i,) if i < 256 else merges[i - 256])])


def in_learning_order(ids, merges):
    for new, pair in enumerate(merges, start=256):
        ids = [part for i in ids for part in (pair if i == new else (i,))]
    return np.array(ids)


def swapped(ids, merges):
    ids = list(ids)
    for new, (left, right) in reversed(list(enumerate(merges, start=256))):
        ids = [part for i in ids for part in ((right, left) if i == new else (i,))]
    return np.array(ids)


def bytes_only(ids, merges):
    return np.array([i for i in ids if i < 256])


def stops_at_256(ids, merges):
    ids = list(ids)
    while max(ids) > 256:
        ids = [part for i in ids for part in ((i,) if i <= 256 else merges[i - 256])]
    return np.array(ids)


def takes_255_for_a_pair(ids, merges):
    ids = list(ids)
    for _ in range(9):
        ids = [part for i in ids for part in ((i,) if i < 255 or not merges else merges[i - 256])]
    return np.array(ids)


def undo_without_return(ids, merges):
    while max(ids) > 255:
        ids = [part for i in ids for part in ((i,) if i < 256 else merges[i - 256])]


def undo_recursively(ids, merges):
    def spelled(i):
        return [i] if i < 256 else [*spelled(merges[i - 256][0]), *spelled(merges[i - 256][1])]

    return [byte for i in ids for byte in spelled(i)]


def undo_with_a_stack(ids, merges):
    todo, done = list(ids)[::-1], bytearray()
    while todo:
        i = todo.pop()
        if i < 256:
            done.append(i)
        else:
            todo += reversed(merges[i - 256])
    return done


def undo_by_spelling(ids, merges):
    spelling = [bytes([i]) for i in range(256)]
    for left, right in merges:
        spelling.append(spelling[left] + spelling[right])
    return np.frombuffer(b"".join(spelling[i] for i in ids), np.uint8)


def indexed(tokens, vocabulary, dy):
    dtable = np.zeros((vocabulary, dy.shape[-1]))
    dtable[tokens] += dy
    return dtable, dy.sum(0)


def right_table(tokens, vocabulary, dy):
    dtable = np.zeros((vocabulary, dy.shape[-1]))
    np.add.at(dtable, tokens, dy)
    return dtable


def mean_of_sequences(tokens, vocabulary, dy):
    return right_table(tokens, vocabulary, dy), dy.mean(0)


def one_sequence(tokens, vocabulary, dy):
    return right_table(tokens, vocabulary, dy), dy[0]


def not_summed(tokens, vocabulary, dy):
    return right_table(tokens, vocabulary, dy), dy


def positions_swapped(tokens, vocabulary, dy):
    return dy.sum(0), right_table(tokens, vocabulary, dy)


def too_few_rows(tokens, vocabulary, dy):
    return right_table(tokens, tokens.max() + 1, dy), dy.sum(0)


def mean_of_places(tokens, vocabulary, dy):
    count = np.bincount(tokens.ravel(), minlength=vocabulary)
    return right_table(tokens, vocabulary, dy) / np.maximum(count, 1)[:, None], dy.sum(0)


def last_sequence_only(tokens, vocabulary, dy):
    return right_table(tokens, vocabulary, dy), dy[-1]


def positions_without_return(tokens, vocabulary, dy):
    right_table(tokens, vocabulary, dy), dy.sum(0)


def positions_by_one_hot(tokens, vocabulary, dy):
    return np.einsum("btv,btd->vd", np.eye(vocabulary)[tokens], dy), np.add.reduce(dy, axis=0)


def positions_by_loops(tokens, vocabulary, dy):
    (B, T), D = tokens.shape, dy.shape[-1]
    dtable, dposition = np.zeros((vocabulary, D)), np.zeros((T, D))
    for b in range(B):
        for t in range(T):
            dtable[tokens[b, t]] += dy[b, t]
            dposition[t] += dy[b, t]
    return [dtable, dposition]


def embedding_path(table, tokens, dz):
    dtable = np.zeros_like(table)
    np.add.at(dtable, tokens, dz @ table)
    return dtable


def output_path(table, tokens, dz):
    return dz.T @ table[tokens]


def repeats_lost(table, tokens, dz):
    dtable = dz.T @ table[tokens]
    dtable[tokens] += dz @ table
    return dtable


def paths_averaged(table, tokens, dz):
    return (embedding_path(table, tokens, dz) + output_path(table, tokens, dz)) / 2


def embedding_doubled(table, tokens, dz):
    return 2 * embedding_path(table, tokens, dz)


def output_doubled(table, tokens, dz):
    return 2 * output_path(table, tokens, dz)


def tied_transposed(table, tokens, dz):
    return (embedding_path(table, tokens, dz) + output_path(table, tokens, dz)).T


def paths_not_added(table, tokens, dz):
    return embedding_path(table, tokens, dz), output_path(table, tokens, dz)


def tied_without_return(table, tokens, dz):
    embedding_path(table, tokens, dz) + output_path(table, tokens, dz)


def tied_by_one_hot(table, tokens, dz):
    one_hot = np.eye(len(table))[tokens]
    return dz.T @ (one_hot @ table) + one_hot.T @ (dz @ table)


def tied_by_loops(table, tokens, dz):
    dtable = np.zeros_like(table)
    for t, token in enumerate(tokens):
        for v in range(len(table)):
            dtable[v] += dz[t, v] * table[token]
            dtable[token] += dz[t, v] * table[v]
    return dtable


WRONG = {
    check.rows_without_gradient: [
        (the_used_ones, "count the others"),
        (repeats_counted, "uses one row"),
        (first_sequence, "the first sequence only"),
        (last_sequence, "the last sequence only"),
        (sequence_by_sequence, "occurs in two sequences"),
        (used_once_only, "used more than once"),
        (up_to_the_largest, "above the largest token"),
        (above_the_largest, "below the largest token"),
        (rows_without_return, "`return` missing"),
    ],
    check.undo_merges: [
        (one_level, "a pair may contain other pairs"),
        (in_learning_order, "a pair may contain other pairs"),
        (swapped, "wrong way round"),
        (bytes_only, "left out"),
        (two_levels, "two levels are not enough"),
        (stops_at_256, "id 256 is a pair too"),
        (takes_255_for_a_pair, "expected (21,)"),
        (undo_without_return, "`return` missing"),
    ],
    check.with_positions_backward: [
        (indexed, "counts only once"),
        (mean_of_sequences, "not the mean"),
        (one_sequence, "the first sequence's share only"),
        (not_summed, "summed over B"),
        (last_sequence_only, "the last sequence's share only"),
        (mean_of_places, "its gradient is the sum"),
        (too_few_rows, "the table has V rows"),
        (positions_swapped, "in the wrong order"),
        (positions_without_return, "`return` missing"),
    ],
    check.tied_backward: [
        (embedding_path, "the path as embedding only"),
        (output_path, "the path as output layer only"),
        (repeats_lost, "both paths are there, but a repeated token"),
        (paths_averaged, "they are averaged"),
        (embedding_doubled, "doubles the path as embedding"),
        (output_doubled, "doubles the path as output layer"),
        (tied_transposed, "transposed"),
        (paths_not_added, "returns 2 values"),
        (tied_without_return, "`return` missing"),
    ],
}

RIGHT = {
    check.rows_without_gradient: [rows_by_counting, rows_by_sets],
    check.undo_merges: [undo_recursively, undo_with_a_stack, undo_by_spelling],
    check.with_positions_backward: [positions_by_one_hot, positions_by_loops],
    check.tied_backward: [tied_by_one_hot, tied_by_loops],
}
