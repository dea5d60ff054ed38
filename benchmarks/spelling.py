"""Write a file of pairs: words of a made-up language as they are spelt, and how they sound.

    python benchmarks/spelling.py --output=spelling.tsv

The rules are our own, in the manner of European spellings. Some look at the next letter (c is s before e, i and y),
some at the end of the word (a final e is silent and lengthens the vowel before it, final voiced consonants lose their
voice), and stress counts syllables from the end, so that the sound of a vowel may depend on the far end of the word.
Some words may be said in two ways, and then stand there twice. Sources have up to 30 letters, targets may have
up to 35 signs; of the default 130,000 the longest has 32.
"""

import argparse
import pathlib
import random
import re
import sys
from collections.abc import Iterator

LONGEST_SPELLING, LONGEST_SOUND = 30, 35
# Parts of a syllable; an empty one is there where a space stands at the end, and for each double space.
ONSETS = "b d f g h k l m n p r s t v z c ch sh th qu bl br cl cr dr fl fr gr pl pr sl sn sp st tr ph "
NUCLEI = {
    "a": 12,
    "e": 12,
    "i": 10,
    "o": 9,
    "u": 7,
    "y": 3,
    "aa": 2,
    "ee": 3,
    "oo": 3,
    "ai": 2,
    "au": 2,
    "ou": 2,
    "oi": 1,
    "ie": 2,
}
CODAS = "n r s l t m nd nt st ng ck b d g ll ss nk x     "
SYLLABLES = [0.08, 0.27, 0.32, 0.2, 0.09, 0.03, 0.01]  # of 1, 2, ... 7

LONG = {"A": "ɛː", "E": "iː", "I": "aj", "O": "oː", "U": "juː", "Y": "aj"}  # vowels that a silent e has lengthened
LETTERS = {  # the first that fits at a place says how it sounds; other letters sound as they are written
    "ch": "ʧ",
    "sh": "ʃ",
    "th": "θ",
    "ph": "f",
    "qu": "kw",
    "ck|kk|cc(?![eiyEIY])": "k",
    "ng(?![aeiouyAEIOUY])": "ŋ",
    "n(?=[kgx])": "ŋ",
    "c(?=[eiyEIY])": "s",
    "c": "k",
    "g(?=[eiyEIY])": "ʤ",
    "x": "ks",
    "(?<=[aeiouy])s(?=[aeiouyAEIOUY])": "z",
    "(?<=[aeiouy])h": "",
    "(?P<twice>[bdfglmnprstvz])(?P=twice)": None,  # said once
    "aa": "aː",
    "ee|ie": "iː",
    "oo": "uː",
    "ai": "ɛː",
    "au": "ɔː",
    "ou": "u",
    "oi": "ɔj",
    "y(?=[aeiou])": "j",
    "y": "i",
    **LONG,
}
RULES = re.compile("|".join(f"(?P<rule{number}>{pattern})" for number, pattern in enumerate(LETTERS)))
SAID = list(LETTERS.values())
SILENT_E = re.compile("(?<![aeiouy])([aeiouy])(qu|[bcdfgklmnprstvz])e$")
VOWELS = "aeiouɛɔə"
UNVOICED = str.maketrans("bdgvzʤ", "ptkfsʧ")


def main():
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="file to write")
    parser.add_argument("--pairs", type=int, default=130_000, help="lines (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the words (%(default)s)")
    args = parser.parse_args()
    if not 1 <= args.pairs <= 1_000_000:
        sys.exit(f"error: --pairs={args.pairs}: must be 1 to 1,000,000")
    try:
        write(args.output, args.pairs, args.seed)
    except OSError as error:
        sys.exit(f"error: --output={args.output}: {error.strerror}")
    print(f"wrote {args.pairs:,} pairs to {args.output}")


def write(path: pathlib.Path, number: int, seed: int):
    """A file of `number` pairs."""
    lines = (f"{spelling}\t{sound}\n" for spelling, sound in pairs(number, seed))
    path.write_text("".join(lines), encoding="utf-8")


def pairs(number: int, seed: int) -> list[tuple[str, str]]:
    """The first `number` pairs of distinct words, a word's two sounds one after the other."""
    out = []
    for word in words(seed):
        out += [(word, sound) for sound in sounds(word)]
        if len(out) >= number:
            return out[:number]


def words(seed: int) -> Iterator[str]:
    """Distinct words whose spelling and sound are not too long, without end."""
    rng, seen = random.Random(seed), set()
    onsets, codas = ONSETS.split(" "), CODAS.split(" ")
    while True:
        [count] = rng.choices(range(1, len(SYLLABLES) + 1), SYLLABLES)
        nuclei = rng.choices(list(NUCLEI), list(NUCLEI.values()), k=count)
        word = "".join(rng.choice(onsets) + nucleus + rng.choice(codas) for nucleus in nuclei)
        word += "e" if rng.random() < 0.15 else ""
        if word not in seen and 2 <= len(word) <= LONGEST_SPELLING and max(map(len, sounds(word))) <= LONGEST_SOUND:
            seen.add(word)
            yield word


def sounds(word: str) -> list[str]:
    """The ways in which a word is said: one, or, with t or d before a long u or with y at the end, two or more."""
    said = stressed(letters_said(word))
    said = re.sub("[bdgvzʤ]+$", lambda end: end[0].translate(UNVOICED), said)
    said = re.sub("[bdgvzʤ]+(?=[ptkfsʧʃθ])", lambda part: part[0].translate(UNVOICED), said)
    ways = [said, re.sub("([td])(ˈ?)juː", lambda part: {"t": "ʧ", "d": "ʤ"}[part[1]] + part[2] + "uː", said)]
    ways += [way + "ː" for way in ways if word.endswith("y") and way.endswith("i")]
    return list(dict.fromkeys(ways))


def letters_said(word: str) -> str:
    """The letters one after the other, without stress."""
    word = SILENT_E.sub(lambda end: end[1].upper() + end[2], word)

    def say(letters: re.Match) -> str:
        sound = SAID[int(letters.lastgroup.removeprefix("rule"))]
        return letters["twice"] if sound is None else sound

    return RULES.sub(say, word)


def stressed(said: str) -> str:
    """Stress on the last long vowel of the last three, else on the last but one; short a and e elsewhere fade."""
    vowels = [part.start() for part in re.finditer(f"[{VOWELS}]", said)]
    if not vowels:
        return said
    long = [place for place in vowels[-3:] if said[place + 1 : place + 2] == "ː"]
    stress = long[-1] if long else vowels[-2:][0]
    faded = {
        place for place in vowels if place != stress and said[place] in "ae" and said[place + 1 : place + 2] != "ː"
    }
    return "".join(
        ("ˈ" if place == stress and len(vowels) > 1 else "") + ("ə" if place in faded else sign)
        for place, sign in enumerate(said)
    )


if __name__ == "__main__":
    main()
