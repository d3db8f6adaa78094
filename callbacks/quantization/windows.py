"""Which blocks are optimised together (spec 2.4)."""

from lightning_modules.parts.options import check, check_range


def sliding_windows(blocks: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """`[start, end)` of every window: stride window - overlap, the last one ends with the last block.

    Args:
        blocks: how many there are.
        window: blocks in a window.
        overlap: blocks that neighbouring windows share.

    Raises:
        OptionError: `window` is below 1, or `overlap` is negative or not below `window`.
    """
    check_range("window", window, "[1, inf)")
    check(0 <= overlap < window, "overlap", overlap, f"in 0..window - 1 = {window - 1}")
    if blocks <= window:
        return [(0, blocks)]
    starts = list(range(0, blocks - window + 1, window - overlap))
    if starts[-1] + window < blocks:
        starts.append(blocks - window)
    return [(start, start + window) for start in starts]
