import { describe, expect, it } from "vitest";
import { Data } from "../src/payload";
import { Scene, shownOf } from "../src/scene";
import { initialView, settle, type View } from "../src/state";
import { makeKind, makeLayer, makePayload, pack } from "./helpers";

// 2 runs x 2 layers x 2 heads of 2 x 2.
const FIRST = [
  [0.5, 0.5, 0.25, 0.75],
  [1, 0, 0, 1],
  [0.75, 0.25, 0.5, 0.5],
  [0.25, 0.75, 1, 0],
];
const SECOND = [
  [0.25, 0.75, 0.25, 0.75],
  [0, 1, 0, 1],
  [0.5, 0.5, 0.5, 0.5],
  [0.25, 0.75, 0.125, 0.875],
];

async function makeScene(): Promise<{ scene: Scene; view: (change: Partial<View>) => View }> {
  const sheets = [...FIRST, ...SECOND];
  const ranges = sheets.flatMap((sheet) => [Math.min(...sheet), Math.max(...sheet)]);
  const payload = makePayload([makeKind([makeLayer(2, 2, 2), makeLayer(2, 2, 2)])], {
    runs: ["a", "b"],
    values: await pack(Float32Array.from(sheets.flat()).buffer),
    ranges: await pack(Float32Array.from(ranges).buffer),
  });
  const data = new Data(payload);
  await data.load();
  const initial = { ...initialView(payload), compare: "first" as const };
  return { scene: new Scene(data), view: (change) => settle({ ...initial, ...change }, payload) };
}

describe("a scene", async () => {
  const { scene, view } = await makeScene();
  const shown = (change: Partial<View>) => {
    const now = view(change);
    const [source] = shownOf(now, scene.data.payload).sources;
    return [...scene.shown(now, source).values];
  };

  it("shows a head of a run, or second minus first", () => {
    expect(shown({ layer: 1, head: 1 })).toEqual(FIRST[3]);
    expect(shown({ layer: 1, head: 1, compare: "second" })).toEqual(SECOND[3]);
    expect(shown({ layer: 1, head: 1, compare: "difference" })).toEqual([0, 0, -0.875, 0.875]);
  });

  it("shows the mean and the maximum of a layer, and the rollout up to it", () => {
    expect(shown({ show: "mean" })).toEqual([0.75, 0.25, 0.125, 0.875]);
    expect(shown({ show: "max", layer: 1 })).toEqual([0.75, 0.75, 1, 0.5]);
    // 0.5 (mean + I): [[0.75, 0.25], [0.375, 0.625]] times [[0.875, 0.125], [0.0625, 0.9375]].
    expect(shown({ show: "rollout", layer: 1 })).toEqual([0.671875, 0.328125, 0.3671875, 0.6328125]);
  });

  it("hides columns in each run before it compares them", () => {
    const change = { hiddenColumns: ["0"], head: 0 };
    expect(shown({ ...change, renormalise: false })).toEqual([0.5, 0.75]);
    expect(shown(change)).toEqual([1, 1]);
    expect(shown({ ...change, compare: "difference", renormalise: false })).toEqual([0.25, 0]);
    expect([...scene.hidden(view(change), 0)!]).toEqual([0.5, 0.25]);
    expect(scene.hidden(view({}), 0)).toBeNull();
  });

  it("scales to 1, to the largest shown, or to the largest of all heads", () => {
    const most = (change: Partial<View>) => {
      const now = view(change);
      return scene.shownScale(now, shownOf(now, scene.data.payload).sources);
    };
    expect(most({})).toEqual({ most: 1, signed: false, mapping: "linear" });
    expect(most({ range: "head", layer: 1, head: 0 }).most).toBe(0.75);
    expect(most({ range: "common", layer: 1, head: 0 }).most).toBe(1);
    // Side by side: the larger of the two.
    expect(most({ range: "head", layer: 1, head: 1, compare: "both" }).most).toBe(1);
    expect(most({ layer: 0, head: 0, compare: "difference" })).toEqual({ most: 0.25, signed: true, mapping: "linear" });
    expect(most({ layer: 0, head: 0, compare: "difference", range: "common" }).most).toBe(1);
  });

  it("needs the sheets up to the last that is shown", () => {
    expect(scene.needs(view({ layer: 1 }))).toBe(3 * 16);
    expect(scene.needs(view({ layer: 1, compare: "both" }))).toBe(7 * 16);
    expect(scene.needs(view({ show: "mean" }))).toBe(8 * 16);
  });
});
