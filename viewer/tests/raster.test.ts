import { describe, expect, it } from "vitest";
import { DARK_PALETTE, LIGHT_PALETTE, luminance, type Packed } from "../src/palette";
import { colourOf, ownScale, position, raster, type Scale, thumbnail, valueAt } from "../src/raster";
import { HIDE, sheetOf } from "./helpers";

const unit: Scale = { most: 1, signed: false, mapping: "linear" };
const signed: Scale = { most: 2, signed: true, mapping: "linear" };
const words = (bytes: Uint8ClampedArray<ArrayBuffer>): Packed[] => [...new Uint32Array(bytes.buffer)];

describe("positions among the colours", () => {
  it("are linear, roots or logarithms of the share of the largest", () => {
    const at = (mapping: Scale["mapping"]) =>
      [0, 0.0001, 0.01, 0.25, 1, 7, -1].map((value) => position(value, { ...unit, mapping }));
    expect(at("linear")).toEqual([0, 0.0001, 0.01, 0.25, 1, 1, 0]);
    expect(at("root")).toEqual([0, 0.01, 0.1, 0.5, 1, 1, 0]);
    const expected = [0, 0, 0.5, 1 + Math.log10(0.25) / 4, 1, 1, 0];
    at("log").forEach((value, i) => expect(value).toBeCloseTo(expected[i], 12));
  });
  it("have zero in the middle if signed", () => {
    expect([-2, -1, 0, 1, 2, 5].map((value) => position(value, signed))).toEqual([0, 0.25, 0.5, 0.75, 1, 1]);
    expect(position(-0.5, { ...signed, mapping: "root" })).toBe(0.25);
  });
  it("are inverted", () => {
    for (const mapping of ["linear", "root", "log"] as const) {
      for (const value of [0.002, 0.3, 1])
        expect(valueAt(position(value, { ...unit, mapping }), { ...unit, mapping })).toBeCloseTo(value, 12);
      for (const value of [-1.5, 0.4])
        expect(valueAt(position(value, { ...signed, mapping }), { ...signed, mapping })).toBeCloseTo(value, 12);
    }
  });
  it("are all of zero where nothing is larger", () => expect(position(0, { ...unit, most: 0 })).toBe(0));
});

describe.each([
  ["light", LIGHT_PALETTE],
  ["dark", DARK_PALETTE],
])("pixels on a %s surface", (_, palette) => {
  it("are those of the tables, and each special cell has its own colour", () => {
    const sheet = sheetOf([
      [0, 1, 0.5, NaN],
      [HIDE, HIDE, Infinity, -Infinity],
    ]);
    const { sequential, masked, nan, positive, negative } = palette;
    const whole = { row: 0, column: 0, rows: 2, columns: 4 };
    expect(words(raster(sheet, whole, unit, palette))).toEqual([
      sequential[0],
      sequential[255],
      sequential[128],
      nan,
      masked[1],
      masked[0],
      positive,
      negative,
    ]);
    expect(new Set([sequential[0], sequential[255], nan, ...masked, positive, negative]).size).toBe(7);
  });
  it("of a part are those of the whole", () => {
    const sheet = sheetOf([
      [0, 0.1, HIDE],
      [0.2, HIDE, 0.4],
      [0.5, 0.6, HIDE],
    ]);
    const whole = words(raster(sheet, { row: 0, column: 0, rows: 3, columns: 3 }, unit, palette));
    const part = words(raster(sheet, { row: 1, column: 1, rows: 2, columns: 2 }, unit, palette));
    expect(part).toEqual([whole[4], whole[5], whole[7], whole[8]]);
  });
  it("of negative numbers diverge from zero", () => {
    const sheet = sheetOf([[-2, 2, 0]]);
    const { diverging } = palette;
    expect(words(raster(sheet, { row: 0, column: 0, rows: 1, columns: 3 }, signed, palette))).toEqual([
      diverging[0],
      diverging[255],
      diverging[128],
    ]);
  });
  it("have a luminance that only rises or only falls from zero on", () => {
    const rises = (table: Packed[]) =>
      table.every((colour, i) => i === 0 || luminance(colour) >= luminance(table[i - 1]));
    const away = palette === DARK_PALETTE ? 1 : -1;
    const ordered = (table: Packed[]) => rises(away > 0 ? table : [...table].reverse());
    expect(ordered([...palette.sequential])).toBe(true);
    expect(ordered([...palette.diverging.slice(128)])).toBe(true);
    expect(ordered([...palette.diverging.slice(0, 127)].reverse())).toBe(true);
    const ends = [palette.sequential[0], palette.sequential[255]].map(luminance);
    expect(Math.abs(ends[0] - ends[1])).toBeGreaterThan(0.7);
  });
});

describe("thumbnails", () => {
  const colours = (sheet: ReturnType<typeof sheetOf>, width: number, height: number) =>
    words(thumbnail(sheet, width, height, unit, LIGHT_PALETTE));
  const colour = (sheet: ReturnType<typeof sheetOf>, i: number) => colourOf(sheet, i, 0, unit, LIGHT_PALETTE);

  it("show the largest of the cells of a pixel, so that a thin diagonal stays", () => {
    const sheet = sheetOf([
      [0.9, 0, 0, 0],
      [0, 0.8, 0, 0.1],
      [0, 0, 0.7, 0],
      [0, 0, 0, 0.6],
    ]);
    expect(colours(sheet, 2, 2)).toEqual([colour(sheet, 0), colour(sheet, 7), colour(sheet, 4), colour(sheet, 10)]);
  });
  it("show NaN before any number, and masked only where all cells are", () => {
    const sheet = sheetOf([[1, NaN, HIDE, 0.1, HIDE, HIDE]]);
    expect(colours(sheet, 3, 1)).toEqual([LIGHT_PALETTE.nan, colour(sheet, 3), LIGHT_PALETTE.masked[1]]);
  });
  it("repeat cells where there are more pixels", () => {
    const sheet = sheetOf([[0, 1]]);
    expect(colours(sheet, 4, 2)).toEqual([0, 0, 1, 1, 0, 0, 1, 1].map((i) => colour(sheet, i)));
  });
});

it("scales by the largest magnitude, signed if something is below zero", () => {
  expect(ownScale({ low: 0, high: 0.3 }, "root")).toEqual({ most: 0.3, signed: false, mapping: "root" });
  expect(ownScale({ low: -4, high: 0.3 }, "linear")).toMatchObject({ most: 4, signed: true });
});
