/** What the user has chosen, as a plain value, and what follows from it. No DOM. */
import type { Kind, Layer, Payload } from "./payload";
import type { Mapping } from "./raster";

export const SHOWS = ["head", "mean", "max", "rollout"] as const;
export const RANGES = ["unit", "head", "common"] as const;
export const MAPPINGS = ["linear", "root", "log"] as const;
export const COMPARISONS = ["first", "second", "difference", "both"] as const;
export const TABS = ["map", "tokens", "picture"] as const;
export const THEMES = ["auto", "light", "dark"] as const;
export type Show = (typeof SHOWS)[number];
export type RangeOf = (typeof RANGES)[number];
export type Comparison = (typeof COMPARISONS)[number];
export type Tab = (typeof TABS)[number];

/** All choices. `row` and `column` are numbers of stored rows and columns; `null` stands for the default of a kind. */
export interface View {
  kind: number;
  layer: number;
  head: number;
  frame: number;
  show: Show;
  range: RangeOf | null;
  mapping: Mapping | null;
  /** "place", or the number of a measure and "down" (highest first) or "up", such as "0 down". */
  order: string;
  /** For each kind, the hidden rows and columns, such as "0, 5-7". */
  hiddenRows: string[];
  hiddenColumns: string[];
  renormalise: boolean;
  tab: Tab;
  compare: Comparison;
  theme: (typeof THEMES)[number];
  row: number;
  column: number;
  pinned: boolean;
  /** The side of the token view whose token is chosen. */
  side: "rows" | "columns";
  zoom: number;
  opacity: number;
}

/** A head of a kind. */
export interface HeadPlace {
  layer: number;
  head: number;
}

/** The largest sheet whose rollout is computed: the product of n x n matrices takes n³ steps per layer. */
export const LARGEST_ROLLOUT = 512;

/** Number of columns from which small weights would all look like 0 on a linear scale. */
const MANY_COLUMNS = 64;

/** Return the choices that a page starts with: the last frame, the first head. */
export function initialView(payload: Payload): View {
  return {
    kind: 0,
    layer: 0,
    head: 0,
    frame: payload.frames.length - 1,
    show: "head",
    range: null,
    mapping: null,
    order: "place",
    hiddenRows: payload.kinds.map(() => ""),
    hiddenColumns: payload.kinds.map(() => ""),
    renormalise: true,
    tab: "map",
    compare: payload.runs.length === 2 ? "both" : "first",
    theme: "auto",
    row: 0,
    column: 0,
    pinned: false,
    side: "rows",
    zoom: 0,
    opacity: 0.55,
  };
}

/** Return the choices with each that the payload does not allow replaced by the nearest that it does. */
export function settle(view: View, payload: Payload): View {
  const kind = clamp(view.kind, payload.kinds.length);
  const layer = clamp(view.layer, payload.kinds[kind].layers.length);
  const { heads } = payload.kinds[kind].layers[layer];
  const settled = {
    ...view,
    kind,
    layer,
    head: clamp(view.head, heads),
    frame: clamp(view.frame, payload.frames.length),
  };
  if (!shows(settled, payload).includes(view.show)) settled.show = "head";
  if (view.tab === "picture" && !payload.kinds[kind].picture) settled.tab = "map";
  if (payload.runs.length < 2) settled.compare = "first";
  if (!orders(settled, payload).includes(view.order)) settled.order = "place";
  const { rows, columns } = kept(settled, payload);
  settled.row = nearest(rows, view.row);
  settled.column = nearest(columns, view.column);
  if (settled.kind !== view.kind) settled.pinned = false;
  return settled;
}

/** Return the kind that is shown. */
export function kindOf(view: View, payload: Payload): Kind {
  return payload.kinds[view.kind];
}

/** Return the layer that is shown. */
export function layerOf(view: View, payload: Payload): Layer {
  return payload.kinds[view.kind].layers[view.layer];
}

/** Return what can be shown of the chosen layer: weights also have means, maxima and, if square and exact, rollout. */
export function shows(view: View, payload: Payload): readonly Show[] {
  const kind = kindOf(view, payload);
  if (kind.quantity !== "weights") return ["head"];
  const { rows } = kind.layers[0];
  const square = kind.layers.every((layer) => layer.rows === rows && layer.columns === rows && layer.reduce === "none");
  // Rollout multiplies layers, so it needs positions that read positions of the same text.
  if (square && rows <= LARGEST_ROLLOUT && !kind.name.includes("cross")) return SHOWS;
  const { heads } = layerOf(view, payload);
  return heads > 1 ? ["head", "mean", "max"] : ["head"];
}

/** Return the range of colours: the chosen one, or that of the quantity. */
export function rangeOf(view: View, payload: Payload): RangeOf {
  if (view.range) return view.range;
  if (view.compare === "difference") return "head";
  return ["weights", "mask"].includes(kindOf(view, payload).quantity) ? "unit" : "head";
}

/** Return the mapping to colours: the chosen one, or a root where most weights are small. */
export function mappingOf(view: View, payload: Payload): Mapping {
  if (view.mapping) return view.mapping;
  const { quantity, layers } = kindOf(view, payload);
  return quantity === "weights" && layers.some((layer) => layer.columns > MANY_COLUMNS) ? "root" : "linear";
}

/** Return whether rows are sums of probability, so that hiding columns hides mass and the rest can be renormalised. */
export function hasMass(view: View, payload: Payload): boolean {
  return kindOf(view, payload).quantity === "weights" && layerOf(view, payload).reduce !== "max";
}

/** Return the numbers of the stored rows and columns of a layer that are not hidden; at least one of each is left. */
export function kept(view: View, payload: Payload, layer = view.layer): { rows: Int32Array; columns: Int32Array } {
  const { shape, block, rows, columns } = payload.kinds[view.kind].layers[layer];
  return {
    rows: keptCells(view.hiddenRows[view.kind], shape[0], block[0], rows),
    columns: keptCells(view.hiddenColumns[view.kind], shape[1], block[1], columns),
  };
}

/** Return the cells, of `block` true positions each, in which no position is hidden; all if none would be left. */
export function keptCells(hidden: string, cells: number, block: number, size: number): Int32Array {
  const hide = new Uint8Array(cells);
  for (const [from, to] of parseRanges(hidden, size))
    hide.fill(1, Math.floor(from / block), Math.floor(to / block) + 1);
  const all = Int32Array.from({ length: cells }, (_, i) => i);
  const left = all.filter((i) => !hide[i]);
  return left.length ? left : all;
}

/** Return the ranges, ends included, that a text such as "0, 5-7" names below `size`; other words are left out. */
export function parseRanges(text: string, size: number): [number, number][] {
  const ranges: [number, number][] = [];
  for (const part of text.split(/[\s,;]+/)) {
    const match = /^(\d+)(?:[-–](\d+))?$/.exec(part);
    if (!match) continue;
    const from = Number(match[1]);
    const to = Math.min(Number(match[2] ?? match[1]), size - 1);
    if (from <= to) ranges.push([from, to]);
  }
  return ranges;
}

/** Return the text of ranges with the positions `[from, to]` added, or removed if all of them were in it. */
export function toggleRange(text: string, from: number, to: number, size: number): string {
  const inside = new Uint8Array(size);
  for (const [first, last] of parseRanges(text, size)) inside.fill(1, first, last + 1);
  const end = Math.min(to + 1, size);
  inside.fill(inside.subarray(from, end).every(Boolean) ? 0 : 1, from, end);
  const parts: string[] = [];
  for (let i = 0; i < size; i++) {
    if (!inside[i]) continue;
    let last = i;
    while (last + 1 < size && inside[last + 1]) last++;
    parts.push(i === last ? String(i) : `${i}-${last}`);
    i = last;
  }
  return parts.join(", ");
}

/** Return the orders that heads can have: by place, and by each measure known of the kind, highest or lowest first. */
export function orders(view: View, payload: Payload): string[] {
  const known = payload.measures.flatMap((measure, i) => {
    const isKnown = measure.values.some((run) => run[view.frame]?.[view.kind]?.some((value) => value !== null));
    return isKnown ? [`${i} down`, `${i} up`] : [];
  });
  return ["place", ...known];
}

/** Return a measure of a head: of the second run, or the difference, if that is compared; null if not known. */
export function measureOf(view: View, payload: Payload, measure: number, place: HeadPlace): number | null {
  const { layers } = payload.kinds[view.kind];
  const number = layers.slice(0, place.layer).reduce((sum, layer) => sum + layer.heads, place.head);
  const [first, second] = payload.measures[measure].values.map((run) => run[view.frame]?.[view.kind]?.[number] ?? null);
  if (view.compare === "second") return second ?? null;
  if (view.compare !== "difference") return first;
  return first === null || second === null ? null : second - first;
}

/** Return all heads of the kind in the chosen order; those without a value are last. */
export function orderedHeads(view: View, payload: Payload): HeadPlace[] {
  const heads = kindOf(view, payload).layers.flatMap((layer, i) =>
    Array.from({ length: layer.heads }, (_, head) => ({ layer: i, head })),
  );
  const measure = orderMeasure(view);
  if (measure === null) return heads;
  const sign = view.order.endsWith("down") ? -1 : 1;
  const keyed = heads.map((place) => ({ place, value: measureOf(view, payload, measure, place) }));
  keyed.sort((a, b) => {
    if (a.value === null || b.value === null) return Number(a.value === null) - Number(b.value === null);
    return sign * (a.value - b.value);
  });
  return keyed.map(({ place }) => place);
}

/** Return the number of the measure that orders the heads; null if they are ordered by place. */
export function orderMeasure(view: View): number | null {
  return view.order === "place" ? null : Number.parseInt(view.order, 10);
}

/** Return the key/value head that a query head reads, and how many query heads read it; null without groups. */
export function groupOf(kind: Kind, layer: number, head: number): { group: number; size: number } | null {
  const size = kind.groups ? kind.layers[layer].heads / kind.groups : 0;
  return size > 1 && Number.isInteger(size) ? { group: Math.floor(head / size), size } : null;
}

/** Return the kept cell that lies `step` places after `cell`, or at an end. */
export function stepCell(cells: Int32Array, cell: number, step: number): number {
  const at = cells.indexOf(nearest(cells, cell));
  return cells[Math.min(Math.max(at + step, 0), cells.length - 1)];
}

/** Return the first of the sorted cells that is not below `cell`, or the last. */
export function nearest(cells: Int32Array, cell: number): number {
  let low = 0;
  let high = cells.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (cells[middle] < cell) low = middle + 1;
    else high = middle;
  }
  return cells[low];
}

function clamp(value: number, count: number): number {
  return Number.isInteger(value) ? Math.min(Math.max(value, 0), count - 1) : 0;
}
