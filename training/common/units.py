"""Numbers of bytes in words."""

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
