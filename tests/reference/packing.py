"""Packing and samples one token at a time, straight from their definition."""


def naive_parts(lengths, sequence_length):
    """Documents cut every `sequence_length` tokens: (document, position) of each part's tokens."""
    parts = []
    for document, length in enumerate(lengths):
        tokens = [(document, position) for position in range(length)]
        parts += [tokens[at : at + sequence_length] for at in range(0, length, sequence_length)]
    return parts


def naive_sequences(parts, sequence_length, orders, look_ahead):
    """Sequences as lists of (document, position); the last one is short if the tokens end."""
    sequences, current = [], []
    for order in orders:
        waiting = list(order)
        while waiting:
            gap = sequence_length - len(current)
            fits = [p for p in waiting[:look_ahead] if len(parts[p]) <= gap]
            # max() keeps the first, and so the oldest, of equally large parts.
            part = max(fits, key=lambda p: len(parts[p])) if fits else waiting[0]
            waiting.remove(part)
            for token in parts[part]:
                current.append(token)
                if len(current) == sequence_length:
                    sequences.append(current)
                    current = []
    return [*sequences, current] if current else sequences


def naive_sample(texts, sequence, sequence_length):
    """Tokens, labels, weights and piece bounds of one sequence of (document, position)."""
    tokens, labels, weights, bounds = [], [], [], [0]
    for at, (document, position) in enumerate(sequence):
        text = texts[document]
        last = position == len(text) - 1
        tokens.append(text[position])
        labels.append(0 if last else text[position + 1])
        weights.append(0 if last else 1)
        if at + 1 == len(sequence) or sequence[at + 1] != (document, position + 1):
            bounds.append(at + 1)
    padding = sequence_length - len(sequence)
    if padding:
        bounds.append(sequence_length)
    return tokens + [0] * padding, labels + [0] * padding, weights + [0] * padding, bounds
