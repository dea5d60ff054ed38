import { describe, expect, it } from "vitest";
import { fromHash, toHash } from "../src/hash";
import {
  groupOf,
  hasMass,
  initialView,
  keptCells,
  mappingOf,
  measureOf,
  nearest,
  orderedHeads,
  orders,
  parseRanges,
  rangeOf,
  settle,
  shows,
  stepCell,
  toggleRange,
} from "../src/state";
import { makeKind, makeLayer, makePayload } from "./helpers";

const measure = (values: (number | null)[][][][]) => ({ name: "entropy", help: "", unit: "nats", values });

describe("hidden positions", () => {
  it("are read from text; what is not a number or too large is left out", () => {
    expect(parseRanges("0, 5-7;9 x -3 12-99 7-5 1e3", 20)).toEqual([
      [0, 0],
      [5, 7],
      [9, 9],
      [12, 19],
    ]);
  });
  it("hide cells, and whole blocks of pooled ones, but never all", () => {
    expect([...keptCells("0, 3-4", 6, 1, 6)]).toEqual([1, 2, 5]);
    expect([...keptCells("3", 3, 2, 5)]).toEqual([0, 2]);
    expect([...keptCells("0-9", 3, 1, 3)]).toEqual([0, 1, 2]);
  });
  it("are added and removed in the text", () => {
    expect(toggleRange("", 3, 3, 9)).toBe("3");
    expect(toggleRange("3", 4, 5, 9)).toBe("3-5");
    expect(toggleRange("3-5", 4, 4, 9)).toBe("3, 5");
    expect(toggleRange("2", 2, 3, 9)).toBe("2-3");
    expect(toggleRange("0-8", 8, 11, 9)).toBe("0-7");
  });
  it("are stepped over", () => {
    const cells = Int32Array.of(1, 2, 5, 9);
    expect([0, 2, 3, 99].map((cell) => nearest(cells, cell))).toEqual([1, 2, 5, 9]);
    expect([
      stepCell(cells, 2, 1),
      stepCell(cells, 2, -1),
      stepCell(cells, 1, -5),
      stepCell(cells, 1, Infinity),
    ]).toEqual([5, 1, 1, 9]);
  });
});

describe("the order of heads", () => {
  const kinds = [makeKind([makeLayer(2, 3, 3), makeLayer(3, 3, 3)]), makeKind([makeLayer(1, 3, 3)])];
  const values = [[[[3, 1, null, 2, 5], [null]]], [[[1, 1, 1, 2.5, null], [null]]]];
  const payload = makePayload(kinds, { runs: ["a", "b"], measures: [measure(values)] });
  const view = settle(initialView(payload), payload);
  const names = (order: string) =>
    orderedHeads({ ...view, order }, payload).map(({ layer, head }) => `${layer}.${head}`);

  it("is by place, or by a measure, unknown values last", () => {
    expect(names("place")).toEqual(["0.0", "0.1", "1.0", "1.1", "1.2"]);
    expect(names("0 down")).toEqual(["1.2", "0.0", "1.1", "0.1", "1.0"]);
    expect(names("0 up")).toEqual(["0.1", "1.1", "0.0", "1.2", "1.0"]);
  });
  it("offers only measures that are known of the kind", () => {
    expect(orders(view, payload)).toEqual(["place", "0 down", "0 up"]);
    expect(orders({ ...view, kind: 1 }, payload)).toEqual(["place"]);
  });
  it("follows what is compared", () => {
    const of = (compare: "first" | "second" | "difference", layer: number, head: number) =>
      measureOf({ ...view, compare }, payload, 0, { layer, head });
    expect([of("first", 1, 1), of("second", 1, 1), of("difference", 1, 1), of("difference", 1, 2)]).toEqual([
      2,
      2.5,
      0.5,
      null,
    ]);
  });
});

describe("defaults", () => {
  const payload = makePayload(
    [
      makeKind([makeLayer(2, 8, 8)]),
      makeKind([makeLayer(2, 8, 100)]),
      makeKind([makeLayer(2, 8, 8)], { quantity: "scores" }),
      makeKind([makeLayer(2, 8, 8)], { name: "cross" }),
      makeKind([makeLayer(2, 600, 600)]),
      makeKind([{ ...makeLayer(2, 8, 8, [2, 2]), reduce: "max" }]),
    ],
    { runs: ["a", "b"], frames: ["1", "2", "3"] },
  );
  const view = { ...settle(initialView(payload), payload), compare: "first" as const };

  it("are the last frame, and ranges and mappings by quantity", () => {
    expect(view.frame).toBe(2);
    expect([0, 2].map((kind) => rangeOf({ ...view, kind }, payload))).toEqual(["unit", "head"]);
    expect(rangeOf({ ...view, compare: "difference" }, payload)).toBe("head");
    expect([0, 1, 2].map((kind) => mappingOf({ ...view, kind }, payload))).toEqual(["linear", "root", "linear"]);
  });
  it("allow rollout of small exact self-attention alone, and mass where rows have it", () => {
    expect([0, 1, 2, 3, 4, 5].map((kind) => shows({ ...view, kind }, payload).length)).toEqual([4, 3, 1, 3, 3, 3]);
    expect([0, 2, 5].map((kind) => hasMass({ ...view, kind }, payload))).toEqual([true, false, false]);
  });
  it("settle what is out of range", () => {
    const wild = {
      ...view,
      kind: 99,
      layer: -4,
      head: 1.5,
      frame: 7,
      row: 400,
      column: 3,
      hiddenColumns: Array(6).fill("3"),
      order: "7 up",
    };
    expect(settle(wild, payload)).toMatchObject({
      kind: 5,
      layer: 0,
      head: 0,
      frame: 2,
      row: 3,
      column: 3,
      order: "place",
    });
    expect(settle({ ...view, hiddenColumns: Array(6).fill("3"), column: 3 }, payload).column).toBe(4);
  });
});

describe("groups", () => {
  it("share keys and values", () => {
    const kind = makeKind([makeLayer(8, 3, 3)], { groups: 2 });
    expect([0, 3, 4, 7].map((head) => groupOf(kind, 0, head)?.group)).toEqual([0, 0, 1, 1]);
    expect(groupOf(makeKind([makeLayer(8, 3, 3)]), 0, 3)).toBeNull();
    expect(groupOf(makeKind([makeLayer(8, 3, 3)], { groups: 8 }), 0, 3)).toBeNull();
  });
});

describe("the address", () => {
  const payload = makePayload([makeKind([makeLayer(2, 8, 8)]), makeKind([makeLayer(4, 8, 8)])], { runs: ["a", "b"] });
  const initial = settle(initialView(payload), payload);

  it("holds the view and gives it back", () => {
    const view = settle(
      {
        ...initial,
        kind: 1,
        head: 3,
        mapping: "log",
        range: "common",
        compare: "difference",
        row: 5,
        tab: "tokens",
        theme: "dark",
        renormalise: false,
        hiddenColumns: ["", "0, 5-7"],
      },
      payload,
    );
    expect(settle(fromHash("#" + toHash(view, initial), initial), payload)).toEqual(view);
    expect(toHash(initial, initial)).toBe("");
  });
  it("is not trusted", () => {
    const text =
      "#kind=1e9&layer=-1&head=<script>&mapping=constructor&tab=__proto__&order=0&columns=<b>&zoom=999999999&row=1";
    expect(settle(fromHash(text, initial), payload)).toEqual({ ...initial, row: 1, zoom: 20 });
    expect(settle(fromHash("#kind=9&columns=1", initial), payload).kind).toBe(1);
  });
});
