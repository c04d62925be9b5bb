"""Solutions of lesson 42: LoRA."""


def lora_backward(x, W, A, B, s, dy):
    """x (N, D), W (D, F), A (D, r), B (r, F), s a number, dy (N, F) → dx, dA, dB."""
    du = s * dy @ B.T  # (N, r)  the gradient with respect to x A
    return dy @ W.T + du @ A.T, x.T @ du, s * (x @ A).T @ dy


def adapter_size(D, H, G, C, E, F, r):
    """→ how many numbers A and B have in one layer: query, key, value, output and all experts."""
    shapes = [(D, H * C), (D, G * C), (D, G * C), (H * C, D)] + 3 * E * [(D, F)]
    return r * sum(inputs + outputs for inputs, outputs in shapes)


def fused_correction(lora_A, lora_B, s, E):
    """lora_A (E·r, inputs), lora_B (outputs, r·E), s a number → s AB of every expert (E, inputs, outputs)."""
    r = len(lora_A) // E
    A = lora_A.reshape(E, r, -1)  # the expert changes slowest
    B = lora_B.reshape(-1, r, E)  # the expert changes fastest
    return s * A.swapaxes(1, 2) @ B.transpose(2, 1, 0)  # (E, inputs, r) times (E, r, outputs)
