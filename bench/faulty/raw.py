"""Finds in a command's output what a person must not see without --verbose: a program's own words."""

import re

CODES = {
    "a traceback": r"Traceback \(most recent call last\)|^\s+File \".+\", line \d+",
    "an exception's class": r"\b[A-Za-z_.]*[A-Z][a-z]+\w*(?:Error|Exception|Warning|Interrupt)\b"
    r"|\bArrow[A-Z]\w+|\bpyarrow\.lib\b|\b[A-Z]\w+Invalid\b|\bOutOfMemory\b",
    "an object's repr": r"<[\w.]+ (?:object )?at 0x[0-9a-f]+|<class '|<function |<built-in|<bound method",
    "a value's repr": r"\b(?:Posix|Windows|Pure\w*)Path\("
    r"|\b(?:np|numpy)\.(?:u?int|float|bool|str|bytes|datetime|array)\w*\("
    r"|\barray\(\[|\bdtype\("
    r"|\btensor\(|\bdatetime\.\w+\(|\bTimestamp\(|\bOrderedDict\(|\bdefaultdict\(|\bScalar\b"
    r"|\b(?:Actor|Object|Node|Task|PlacementGroup)ID\(",
    "a dict or list of Python": r"\{'[\w./ -]+': |\{\d+: |\['[^']*'(?:, '|\])|\[\"[^\"]*\"(?:, \"|\])"
    r"|\('[^']*',(?: |\))|\bb'[^']*'|\bb\"[^\"]*\"|\[Errno ",
    "a line of a library's log": r"\*\*\* SIG|\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ ?[A-Z]? "
    r"|^\d{4}[-/]\d\d[-/]\d\d \d\d:\d\d:\d\d|\(raylet\)|\(\w+ pid=\d+|\b[IWEF]\d{4} \d\d:\d\d:\d\d"
    r"|^(?:DEBUG|INFO|WARNING|ERROR|CRITICAL):|^\S+\.(?:py|cc|h):\d+:|\[symbolize\]|\bcore dumped\b"
    r"|^Aborted|terminate called|@\s+0x[0-9a-f]{6,}|^Fatal Python",
    "an error of the program itself": r"this should not have happened|please report",
    "an address in memory": r"\b0x[0-9a-f]{8,}\b",
}
CODECS = re.compile(
    r"^(?:libpng (?:warning|error)|Corrupt JPEG|Premature end of JPEG|JPEG datastream|Invalid SOS"
    r"|Warning: unknown JFIF|TIFF\w*: |.*extraneous bytes before marker|\[ ?(?:WARN|ERROR):\d+@)",
    re.M,
)
NAMES = re.compile(r"\.(?:jpe?g|png|webp|bmp|tiff?|gif)\b", re.I)


def raw_parts(text: str) -> list[str]:
    """Each kind of a program's own words in an output, with the line that has it."""
    found = []
    for kind, pattern in CODES.items():
        if match := re.search(pattern, text, re.M):
            found.append(f"{kind}: {line_of(text, match)}")
    for match in CODECS.finditer(text):
        line = line_of(text, match)
        if not NAMES.search(line):
            found.append(f"a codec's line without a file: {line}")
            break
    return found


def line_of(text: str, match: re.Match) -> str:
    start = text.rfind("\n", 0, match.start()) + 1
    end = text.find("\n", match.start())
    line = text[start : end if end >= 0 else len(text)]
    around = max(0, match.start() - start - 80)
    return line[around : around + 180].strip()
