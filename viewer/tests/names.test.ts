import { describe, expect, it } from "vitest";
import { cellName, describeCell, fileName, formatNumber, readable, tickName, visible } from "../src/names";

describe("tokens", () => {
  it.each([
    ["cat", "cat"],
    ["", "∅"],
    [" ", "␣"],
    [" a b", "␣a␣b"],
    ["\n", "⏎"],
    ["\t", "⇥"],
    ["\0", "\\x00"],
    ["\x7f\x85", "\\x7f\\x85"],
    ["\u202eabc", "\\u202eabc"],
    ["\u2066x\u2069", "\\u2066x\\u2069"],
    ["\u200f", "\\u200f"],
    ["\u2028\u2029", "\\u2028\\u2029"],
    ["\ud800", "\\ud800"],
    ["a\udc00b", "a\\udc00b"],
    ["\udc00\ud800", "\\udc00\\ud800"],
    ["😀", "😀"],
    ["👩‍👧", "👩‍👧"],
    ["\u0301", "◌\u0301"],
    ["e\u0301", "e\u0301"],
    ["\u200b\ufeff\u00a0", "\\u200b\\ufeff\\xa0"],
    ["مرحبا", "مرحبا"],
    ["</script>", "</script>"],
    ["&amp;", "&amp;"],
  ])("%j show as %j", (token, shown) => expect(visible(token)).toBe(shown));

  it("are cut between characters", () => {
    expect(visible("x".repeat(10_000), 10)).toBe("xxxxxxxxx…");
    expect(visible("😀".repeat(30), 10)).toMatch(/^😀+…$/u);
  });
  it("leave words of titles as they are, but nothing hidden", () => {
    expect(readable("a b\u202e\0\nc")).toBe("a b\\u202e\\x00 c");
  });
});

describe("cells", () => {
  const named = { label: "", names: ["the", "cat", "", "on", "a"] };
  const numbered = { label: "", names: null };
  it("have names, or numbers", () => {
    expect([cellName(named, 1, 1, 5), cellName(named, 2, 1, 5), cellName(numbered, 3, 1, 5)]).toEqual([
      "cat",
      "∅",
      "3",
    ]);
    expect([describeCell(named, 1, 1, 5), describeCell(numbered, 1, 1, 5)]).toEqual(["1 'cat'", "1"]);
  });
  it("that are pooled have the first and the last", () => {
    expect([cellName(named, 0, 2, 5), cellName(named, 2, 2, 5), cellName(numbered, 1, 2, 5)]).toEqual([
      "the … cat",
      "a",
      "2–3",
    ]);
    expect([describeCell(numbered, 2, 2, 5), tickName(numbered, 1, 2, 5)]).toEqual(["4", "2"]);
  });
});

it("formats numbers with four digits", () => {
  const numbers = [0.42134, 0, 1, -0.5, 1e-5, 123456, NaN, Infinity, -Infinity, 12.345678];
  expect(numbers.map(formatNumber)).toEqual([
    "0.4213",
    "0",
    "1",
    "−0.5",
    "1.00e−5",
    "1.23e+5",
    "NaN",
    "+∞",
    "−∞",
    "12.35",
  ]);
});

it("names files safely", () => {
  expect(fileName(["../a b%", "é<x>", "3"], ".png")).toBe("a-b-e-x-3.png");
  expect(fileName(["…"], ".svg")).toBe("attention.svg");
});
