"""Numbers of bytes, and durations, in words."""

_NAMES = ("kB", "MB", "GB")


def in_bytes(number: float, kilo: int = 1000) -> str:
    """Format bytes with a unit that leaves no empty "0.00 GB": "393 kB", "12 MB", "1.50 GB".

    Args:
        number: of bytes.
        kilo: 1000 for files and disks; 1024 for memory, whose flags count so.
    """
    for power, name in enumerate(_NAMES, start=1):
        size = number / kilo**power
        if size < 999.5 and name != _NAMES[-1]:
            return f"{size:.0f} {name}"
    return f"{size:.2f} {name}"


def in_words(seconds: float) -> str:
    """Format a duration: "40 s", "12 min", "2 h 10 min", "3 d 4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{minutes // 60} h {minutes % 60} min"
