/** Where things are on the two canvases, and what is at a point. Lengths are CSS pixels. No DOM. */
import { groupOf, type HeadPlace } from "./state";
import type { Kind } from "./payload";

/** A rectangle. */
export interface Rect {
  x: number;
  y: number;
  width: number;
  height: number;
}

/** The large map: labels to the left and above stay in view while the cells scroll. `width`, `height`: of all. */
export interface MapLayout {
  left: number;
  top: number;
  cellWidth: number;
  cellHeight: number;
  rows: number;
  columns: number;
  width: number;
  height: number;
}

/** Side of the largest cells that are not zoomed. */
export const LARGEST_FIT = 44;
const LARGEST_CELL = 128;
const ZOOM_STEP = 1.3;
const MARGIN = 10;
const TITLES = 110;

/**
 * Return the layout of a map in the room given. Cells are whole device pixels, at least 1 CSS pixel, and square unless
 * one axis has far fewer. `zoom` is the number of steps above the size that fits.
 */
export function mapLayout(
  rows: number,
  columns: number,
  room: { width: number; height: number },
  labels: { left: number; top: number },
  zoom: number,
  ratio: number,
): MapLayout {
  const fitWidth = (room.width - labels.left - MARGIN) / columns;
  const fitHeight = (room.height - labels.top - MARGIN) / rows;
  const square = Math.min(fitWidth, fitHeight, LARGEST_FIT);
  const side = (fit: number, count: number, other: number) => {
    // A strip of few long cells is easier to see and to hit.
    const stretched = count * 4 <= other ? Math.min(fit, 24) : 0;
    const scaled = Math.min(Math.max(square, stretched, 1) * ZOOM_STEP ** zoom, LARGEST_CELL);
    return Math.max(Math.floor(scaled * ratio) / ratio, 1);
  };
  const cellWidth = side(fitWidth, columns, rows);
  const cellHeight = side(fitHeight, rows, columns);
  // The titles of the axes need room, however few the cells.
  const width = labels.left + Math.max(columns * cellWidth + MARGIN, TITLES);
  const height = labels.top + Math.max(rows * cellHeight + MARGIN, TITLES);
  return { ...labels, cellWidth, cellHeight, rows, columns, width, height };
}

/** What is at a point of the map: numbers of shown rows and columns; null on the labels of the other axis. */
export interface MapHit {
  row: number | null;
  column: number | null;
}

/** Return what is at a point of the map's canvas when its cells are scrolled by `scroll`; null if nothing is there. */
export function mapHit(layout: MapLayout, x: number, y: number, scroll: { x: number; y: number }): MapHit | null {
  const column = x < layout.left ? null : Math.floor((x - layout.left + scroll.x) / layout.cellWidth);
  const row = y < layout.top ? null : Math.floor((y - layout.top + scroll.y) / layout.cellHeight);
  if ((row === null && column === null) || (row ?? 0) >= layout.rows || (column ?? 0) >= layout.columns) return null;
  return { row, column };
}

/** The overview: thumbnails of heads in rows of layers, or flowing in the order of a measure. */
export interface GridLayout {
  heads: HeadPlace[];
  thumb: { width: number; height: number };
  left: number;
  top: number;
  width: number;
  height: number;
  /** Rectangle of the i-th thumbnail. */
  rect(i: number): Rect;
  /** The thumbnail at a point of the scrolled content; -1 if there is none. */
  at(x: number, y: number): number;
}

export interface GridOptions {
  kind: Kind;
  heads: HeadPlace[];
  /** Height of a thumbnail per width. */
  aspect: number;
  flow: boolean;
  width: number;
}

const GAP = 4;
const GROUP_GAP = 8;
const SMALLEST = 14;
const LARGEST = 104;
const FLOW_LABEL = 34;

/** Return the layout of the overview in the width given: thumbnails as large as fit, but at least 14 pixels wide. */
export function gridLayout(options: GridOptions, left: number): GridLayout {
  return options.flow ? flowLayout(options) : tableLayout(options, left);
}

function tableLayout({ kind, heads, aspect, width }: GridOptions, left: number): GridLayout {
  const most = Math.max(...kind.layers.map((layer) => layer.heads));
  const groupGaps = kind.groups && kind.layers.some((_, i) => groupOf(kind, i, 0)) ? (kind.groups - 1) * GROUP_GAP : 0;
  const top = groupGaps || (kind.groups && groupOf(kind, 0, 0)) ? 40 : 22;
  const thumb = thumbSize((width - left - groupGaps) / most - GAP, aspect);
  const starts = kind.layers.map((_, i) => kind.layers.slice(0, i).reduce((sum, layer) => sum + layer.heads, 0));
  const rect = (i: number): Rect => {
    const { layer, head } = heads[i];
    const x = left + head * (thumb.width + GAP) + (groupOf(kind, layer, head)?.group ?? 0) * GROUP_GAP;
    return { x, y: top + layer * (thumb.height + GAP), ...thumb };
  };
  const at = (x: number, y: number): number => {
    const layer = Math.floor((y - top) / (thumb.height + GAP));
    if (x < left || layer < 0 || layer >= kind.layers.length) return -1;
    const count = kind.layers[layer].heads;
    for (let head = 0; head < count; head++) if (inside(rect(starts[layer] + head), x, y)) return starts[layer] + head;
    return -1;
  };
  const height = top + kind.layers.length * (thumb.height + GAP);
  return { heads, thumb, left, top, width: left + most * (thumb.width + GAP) + groupGaps, height, rect, at };
}

function flowLayout({ heads, aspect, width }: GridOptions): GridLayout {
  const perRow = Math.max(1, Math.min(heads.length, Math.floor(width / (64 + GAP))));
  const thumb = thumbSize(Math.max(64, width / perRow - GAP), aspect);
  const step = { x: thumb.width + GAP, y: thumb.height + GAP + FLOW_LABEL };
  const rect = (i: number) => ({ x: (i % perRow) * step.x, y: Math.floor(i / perRow) * step.y, ...thumb });
  const at = (x: number, y: number): number => {
    const column = Math.floor(x / step.x);
    const i = Math.floor(y / step.y) * perRow + column;
    return column >= 0 && column < perRow && i >= 0 && i < heads.length ? i : -1;
  };
  const height = Math.ceil(heads.length / perRow) * step.y;
  return { heads, thumb, left: 0, top: 0, width: perRow * step.x, height, rect, at };
}

/** Return the head that an arrow key leads to from the i-th: the next to the side, or the nearest above or below. */
export function gridStep(layout: GridLayout, i: number, key: string): number {
  const last = layout.heads.length - 1;
  if (key === "ArrowLeft") return Math.max(i - 1, 0);
  if (key === "ArrowRight") return Math.min(i + 1, last);
  if (key === "Home") return 0;
  if (key === "End") return last;
  const sign = key === "ArrowUp" ? -1 : 1;
  const from = layout.rect(i);
  let best = i;
  let distance = Infinity;
  for (let k = 0; k <= last; k++) {
    const to = layout.rect(k);
    const down = sign * (to.y - from.y);
    if (down <= 0) continue;
    const far = down * 1000 + Math.abs(to.x - from.x);
    if (far < distance) [best, distance] = [k, far];
  }
  return best;
}

/** Return the step of 1, 2, 5, 10, 20, ... labels at which they are at least `room` pixels apart. */
export function labelStep(cell: number, room: number): number {
  for (let ten = 1; ; ten *= 10) for (const k of [1, 2, 5]) if (k * ten * cell >= room) return k * ten;
}

function thumbSize(width: number, aspect: number): { width: number; height: number } {
  const fitted = Math.floor(Math.min(Math.max(width, SMALLEST), LARGEST));
  return { width: fitted, height: Math.max(8, Math.round(fitted * Math.min(Math.max(aspect, 0.4), 1.6))) };
}

function inside(rect: Rect, x: number, y: number): boolean {
  return x >= rect.x && x < rect.x + rect.width && y >= rect.y && y < rect.y + rect.height;
}
