"""Solutions of lesson 01: tokens and the embedding."""

import numpy as np


def rows_without_gradient(tokens, vocabulary):
    """tokens (B, T) integers in [0, V) → int."""
    return vocabulary - len(np.unique(tokens))


def undo_merges(ids, merges):
    """ids: a list of integers; merges: a list of pairs → an array of bytes, as integers below 256."""
    ids = list(ids)
    # a merge may contain earlier merges but no later ones: undo them in reverse order
    for new, pair in reversed(list(enumerate(merges, start=256))):
        ids = [part for token in ids for part in (pair if token == new else (token,))]
    return np.array(ids)


def with_positions_backward(tokens, vocabulary, dy):
    """tokens (B, T), dy (B, T, D) → dtable (V, D), dposition (T, D)."""
    dtable = np.zeros((vocabulary, dy.shape[-1]))
    np.add.at(dtable, tokens, dy)
    return dtable, dy.sum(0)  # every sequence uses place t once


def tied_backward(table, tokens, dz):
    """table (V, D), tokens (N,), dz (N, V) → dtable (V, D)."""
    y = table[tokens]  # (N, D)
    dtable = dz.T @ y  # as output layer: z = y tableᵀ
    np.add.at(dtable, tokens, dz @ table)  # as embedding: dy = dz table
    return dtable
