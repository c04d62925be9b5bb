"""Wrong answers to the exercises of lesson 01, each with words that its hint must hold."""

import numpy as np

from minimoe.exercises import lesson_01 as check


def the_used_ones(tokens, vocabulary):
    return len(set(tokens.ravel().tolist()))


def repeats_counted(tokens, vocabulary):
    return vocabulary - tokens.size


def first_sequence(tokens, vocabulary):
    return vocabulary - len(set(tokens[0].tolist()))


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


WRONG = {
    check.rows_without_gradient: [
        (the_used_ones, "count the others"),
        (repeats_counted, "uses one row"),
        (first_sequence, "the first sequence only"),
    ],
    check.undo_merges: [
        (one_level, "a pair may contain other pairs"),
        (in_learning_order, "a pair may contain other pairs"),
        (swapped, "wrong way round"),
        (bytes_only, "left out"),
    ],
    check.with_positions_backward: [
        (indexed, "counts only once"),
        (mean_of_sequences, "not the mean"),
        (one_sequence, "the first sequence's share only"),
        (not_summed, "summed over B"),
    ],
    check.tied_backward: [
        (embedding_path, "the path as embedding only"),
        (output_path, "the path as output layer only"),
        (repeats_lost, "both paths are there"),
    ],
}
