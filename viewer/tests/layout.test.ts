import { describe, expect, it } from "vitest";
import { gridLayout, gridStep, labelStep, mapHit, mapLayout } from "../src/layout";
import { orderedHeads, initialView, settle } from "../src/state";
import { makeKind, makeLayer, makePayload } from "./helpers";

const labels = { left: 50, top: 30 };

describe("the large map", () => {
  it("has square cells of whole device pixels that fit", () => {
    const layout = mapLayout(10, 20, { width: 470, height: 500 }, labels, 0, 1);
    expect([layout.cellWidth, layout.cellHeight]).toEqual([20, 20]);
    expect(mapLayout(100, 100, { width: 310, height: 900 }, labels, 0, 2).cellWidth).toBe(2.5);
  });
  it("scrolls where cells would be less than a pixel, and stretches a strip", () => {
    const layout = mapLayout(1, 10_000, { width: 800, height: 500 }, labels, 0, 1);
    expect([layout.cellWidth, layout.cellHeight]).toEqual([1, 24]);
    expect(layout.width).toBeGreaterThan(10_000);
  });
  it("grows with the zoom", () => {
    const at = (zoom: number) => mapLayout(100, 100, { width: 360, height: 900 }, labels, zoom, 1).cellWidth;
    expect(at(0)).toBe(3);
    expect(at(3)).toBeGreaterThan(at(1));
  });
  it("finds cells, rows and columns at a point, scrolled or not", () => {
    const layout = mapLayout(10, 20, { width: 470, height: 500 }, labels, 0, 1);
    expect(mapHit(layout, 50, 30, { x: 0, y: 0 })).toEqual({ row: 0, column: 0 });
    expect(mapHit(layout, 50 + 39, 30 + 20, { x: 0, y: 0 })).toEqual({ row: 1, column: 1 });
    expect(mapHit(layout, 50 + 39, 30 + 20, { x: 100, y: 60 })).toEqual({ row: 4, column: 6 });
    expect(mapHit(layout, 50 + 39, 10, { x: 0, y: 0 })).toEqual({ row: null, column: 1 });
    expect(mapHit(layout, 10, 35, { x: 0, y: 0 })).toEqual({ row: 0, column: null });
    expect(mapHit(layout, 10, 10, { x: 0, y: 0 })).toBeNull();
    expect(mapHit(layout, 460, 35, { x: 0, y: 0 })).toBeNull();
  });
});

describe("the overview", () => {
  const kind = makeKind([makeLayer(4, 3, 3), makeLayer(2, 3, 3)], { groups: 2 });
  const payload = makePayload([kind]);
  const heads = orderedHeads(settle(initialView(payload), payload), payload);
  const table = gridLayout({ kind, heads, aspect: 1, flow: false, width: 400 }, 60);
  const flow = gridLayout({ kind, heads, aspect: 1, flow: true, width: 240 }, 60);

  it("finds the head at each thumbnail's middle, and none between them", () => {
    for (const layout of [table, flow]) {
      heads.forEach((_, i) => {
        const { x, y, width, height } = layout.rect(i);
        expect(layout.at(x + width / 2, y + height / 2)).toBe(i);
      });
      expect(layout.at(-1, 5)).toBe(-1);
    }
    const [second, third] = [table.rect(1), table.rect(2)];
    // A wider gap parts the groups.
    expect(third.x - second.x).toBeGreaterThan(second.x - table.rect(0).x);
    expect(table.at(third.x - 2, third.y + 5)).toBe(-1);
    expect(table.at(table.rect(3).x + 5, table.rect(5).y + 5)).toBe(-1);
  });
  it("steps with the arrow keys to the nearest head", () => {
    expect(gridStep(table, 2, "ArrowDown")).toBe(5);
    expect(gridStep(table, 5, "ArrowUp")).toBe(1);
    expect(gridStep(table, 0, "ArrowLeft")).toBe(0);
    expect(gridStep(table, 3, "ArrowRight")).toBe(4);
    expect(gridStep(table, 4, "ArrowDown")).toBe(4);
    expect([gridStep(table, 2, "Home"), gridStep(table, 2, "End")]).toEqual([0, 5]);
  });
  it("scrolls rather than have thumbnails too small to hit", () => {
    const wide = makeKind(Array.from({ length: 96 }, () => makeLayer(96, 3, 3)));
    const many = Array.from({ length: 9216 }, (_, i) => ({ layer: Math.floor(i / 96), head: i % 96 }));
    const layout = gridLayout({ kind: wide, heads: many, aspect: 1, flow: false, width: 400 }, 60);
    expect(layout.thumb.width).toBe(14);
    expect(layout.width).toBeGreaterThan(400);
    const { x, y } = layout.rect(9000);
    expect(layout.at(x + 3, y + 3)).toBe(9000);
  });
});

it("labels every 1st, 2nd, 5th, 10th, ... cell", () => {
  expect([20, 8, 4, 1.6, 1, 0.1].map((cell) => labelStep(cell, 16))).toEqual([1, 2, 5, 10, 20, 200]);
});
