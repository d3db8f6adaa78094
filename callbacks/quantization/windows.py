"""Which blocks are optimised together (spec 2.4)."""


def sliding_windows(blocks: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """`[start, end)` of every window: stride window - overlap, the last one ends with the last block.

    Args:
        blocks: how many there are.
        window: blocks in a window.
        overlap: blocks that neighbouring windows share.

    Raises:
        ValueError: `window` is below 1, or `overlap` is negative or not below `window`.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}.")
    if not 0 <= overlap < window:
        raise ValueError(f"overlap must be in 0..window - 1 = {window - 1}, got {overlap}.")
    if blocks <= window:
        return [(0, blocks)]
    starts = list(range(0, blocks - window + 1, window - overlap))
    if starts[-1] + window < blocks:
        starts.append(blocks - window)
    return [(start, start + window) for start in starts]
