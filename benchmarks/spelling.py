"""Write a file of pairs: the spelling and the sound of the words of a made-up language.

    python benchmarks/spelling.py --output=spelling.tsv

The rules are made up, in the style of European spellings. Some depend on the next letter (c is s before e, i and y),
some on the end of the word (a final e is silent and lengthens the vowel before it, final voiced consonants become
voiceless). Stress counts syllables from the end, so the sound of a vowel may depend on the far end of the word. A word
with several sounds has one line per sound. Sources have up to 30 letters, targets may have up to 35 signs; of the
default 130,000 the longest has 32.
"""

import argparse
import pathlib
import random
import re
import sys
from collections.abc import Iterator

LONGEST_SPELLING, LONGEST_SOUND = 30, 35
# Parts of a syllable, split at single spaces: a space at the end, and each further space, gives an empty part.
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
LETTERS = {  # the first pattern that matches at a letter gives its sound; other letters sound as written
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
    "(?P<twice>[bdfglmnprstvz])(?P=twice)": None,  # pronounced once
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
    parser.add_argument("--output", type=pathlib.Path, required=True, help="File to write.")
    parser.add_argument("--pairs", type=int, default=130_000, help="Number of lines (%(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the words (%(default)s).")
    args = parser.parse_args()
    if not 1 <= args.pairs <= 1_000_000:
        sys.exit(f"error: --pairs={args.pairs}: must be 1 to 1,000,000")
    try:
        write(args.output, args.pairs, args.seed)
    except OSError as error:
        sys.exit(f"error: --output={args.output}: {error.strerror}")
    print(f"wrote {args.pairs:,} pairs to {args.output}")


def write(path: pathlib.Path, number: int, seed: int):
    """Write a file of `number` pairs."""
    lines = (f"{spelling}\t{sound}\n" for spelling, sound in pairs(number, seed))
    path.write_text("".join(lines), encoding="utf-8")


def pairs(number: int, seed: int) -> list[tuple[str, str]]:
    """Return the first `number` pairs of distinct words; the sounds of a word follow each other."""
    out = []
    for word in words(seed):
        out += [(word, sound) for sound in sounds(word)]
        if len(out) >= number:
            return out[:number]


def words(seed: int) -> Iterator[str]:
    """Draw distinct words whose spelling and sound are not too long, without end."""
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
    """Return the sounds of a word: one, or with t or d before a long u or with y at the end several."""
    sound = stressed(letters_said(word))
    sound = re.sub("[bdgvzʤ]+$", lambda end: end[0].translate(UNVOICED), sound)
    sound = re.sub("[bdgvzʤ]+(?=[ptkfsʧʃθ])", lambda part: part[0].translate(UNVOICED), sound)
    ways = [sound, re.sub("([td])(ˈ?)juː", lambda part: {"t": "ʧ", "d": "ʤ"}[part[1]] + part[2] + "uː", sound)]
    ways += [way + "ː" for way in ways if word.endswith("y") and way.endswith("i")]
    return list(dict.fromkeys(ways))


def letters_said(word: str) -> str:
    """Return the sound of a word letter by letter, without stress."""
    word = SILENT_E.sub(lambda end: end[1].upper() + end[2], word)

    def say(letters: re.Match) -> str:
        sound = SAID[int(letters.lastgroup.removeprefix("rule"))]
        return letters["twice"] if sound is None else sound

    return RULES.sub(say, word)


def stressed(sound: str) -> str:
    """Add stress: on the last long vowel of the last three, else on the last but one. Other short a and e become ə."""
    vowels = [part.start() for part in re.finditer(f"[{VOWELS}]", sound)]  # their indices
    if not vowels:
        return sound
    long = [vowel for vowel in vowels[-3:] if sound[vowel + 1 : vowel + 2] == "ː"]
    stress = long[-1] if long else vowels[-2:][0]
    faded = {
        vowel for vowel in vowels if vowel != stress and sound[vowel] in "ae" and sound[vowel + 1 : vowel + 2] != "ː"
    }
    return "".join(
        ("ˈ" if index == stress and len(vowels) > 1 else "") + ("ə" if index in faded else sign)
        for index, sign in enumerate(sound)
    )


if __name__ == "__main__":
    main()
