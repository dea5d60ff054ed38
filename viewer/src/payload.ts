/** The page's data: its types, and base64 → gzip → typed arrays. `attn/viewer/page.py` writes what is read here. */
import { readable } from "./names";
import { MASKED, type Sheet, sheetOver } from "./sheet";

export interface Payload {
  version: 1;
  title: string;
  note: string;
  encoding: "float32" | "levels";
  runs: string[];
  frames: string[];
  kinds: Kind[];
  measures: Measure[];
  values: string;
  ranges: string;
  top: { k: number; index: string; value: string } | null;
}

export interface Kind {
  name: string;
  title: string;
  rows: Axis;
  columns: Axis;
  layers: Layer[];
  groups: number | null;
  quantity: "weights" | "scores" | "mask" | "values";
  picture: Picture | null;
}

/** Rows are queries and columns are keys; without names their numbers are shown. */
export interface Axis {
  label: string;
  names: string[] | null;
}

/** Heads of one layer: `rows`, `columns` are true sizes, `shape` is stored; a stored cell is a `block` of true ones. */
export interface Layer {
  name: string;
  heads: number;
  rows: number;
  columns: number;
  block: [number, number];
  shape: [number, number];
  reduce: "none" | "mass" | "max";
}

/** A number per head to sort by: `values[run][frame][kind][head among all heads of the kind]`. */
export interface Measure {
  name: string;
  help: string;
  unit: string;
  values: (number | null)[][][][];
}

/** An image whose patches are columns `first`, `first + 1`, ... row by row; if `rows_too`, also rows. */
export interface Picture {
  url: string;
  width: number;
  height: number;
  grid: [number, number];
  first: number;
  rows_too: boolean;
}

/** Where one sheet is: the numbers of its run, frame, kind, layer and head. */
export interface Place {
  run: number;
  frame: number;
  kind: number;
  layer: number;
  head: number;
}

/** One of the exact largest values of a row. */
export interface Largest {
  row: number;
  column: number;
  value: number;
}

const NO_COLUMN = 0xffffffff;
const LEVELS = { nan: 255, masked: 254, positive: 253, negative: 252, highest: 126 };

/** Return the payload with the texts that are not tokens made safe to show: nothing in them turns or hides the rest. */
export function withReadableTexts(payload: Payload): Payload {
  const axis = ({ label, names }: Axis): Axis => ({ label: readable(label), names });
  return {
    ...payload,
    title: readable(payload.title),
    note: readable(payload.note),
    runs: payload.runs.map(readable),
    frames: payload.frames.map(readable),
    measures: payload.measures.map((measure) => ({
      ...measure,
      name: readable(measure.name),
      unit: readable(measure.unit),
    })),
    kinds: payload.kinds.map((kind) => ({
      ...kind,
      title: readable(kind.title),
      rows: axis(kind.rows),
      columns: axis(kind.columns),
      layers: kind.layers.map((layer) => ({ ...layer, name: readable(layer.name) })),
    })),
  };
}

/** Bytes of gzip inflated at a time: small enough that the first sheet is there long before the last. */
const SLICE = 1 << 18;

/** Inflate a base64 text of gzip into `target`, and tell how many bytes have arrived after each part. */
export async function inflate(base64: string, target: Uint8Array, arrived: (bytes: number) => void): Promise<void> {
  const bytes = fromBase64(base64);
  let at = 0;
  const source = new ReadableStream<BufferSource>({
    pull(controller) {
      if (at >= bytes.length) return controller.close();
      controller.enqueue(bytes.subarray(at, at + SLICE));
      at += SLICE;
    },
  });
  const reader = source.pipeThrough(new DecompressionStream("gzip")).getReader();
  let filled = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    expectLength(filled + part.value.length <= target.length, filled + part.value.length, target.length);
    target.set(part.value, filled);
    filled += part.value.length;
    arrived(filled);
  }
  expectLength(filled === target.length, filled, target.length);
}

function fromBase64(text: string): Uint8Array<ArrayBuffer> {
  const native = (Uint8Array as unknown as { fromBase64?: (text: string) => Uint8Array<ArrayBuffer> }).fromBase64;
  if (native) return native.call(Uint8Array, text);
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/** Counts of what lies before a layer in one frame of one run. */
interface Offset {
  cells: number;
  sheets: number;
  rows: number;
}

/** Typed arrays of all sheets, and where each sheet lies in them. They fill while the page already shows the first. */
export class Data {
  /** Whether all sheets have arrived. */
  complete = false;
  /** Bytes of all sheets. */
  readonly size: number;
  readonly #offsets: Offset[][];
  readonly #frame: Offset = { cells: 0, sheets: 0, rows: 0 };
  readonly #values: Uint8Array<ArrayBuffer>;
  readonly #ranges: Float32Array<ArrayBuffer>;
  #top: { index: Uint32Array; value: Float32Array } | null = null;
  #arrived = 0;
  #waiting: { bytes: number; resolve: () => void }[] = [];

  constructor(readonly payload: Payload) {
    this.#offsets = payload.kinds.map((kind) => kind.layers.map((layer) => this.#advance(layer)));
    this.#ranges = new Float32Array(this.#frames * this.#frame.sheets * 2);
    this.size = this.#frames * this.#frame.cells * this.#width;
    this.#values = new Uint8Array(this.size);
  }

  /** Read everything: the ranges, then sheet by sheet, then what is exact of pooled ones. */
  async load(): Promise<void> {
    const { values, ranges, top } = this.payload;
    await inflate(ranges, new Uint8Array(this.#ranges.buffer), () => {});
    await inflate(values, this.#values, (bytes) => this.#arrive(bytes));
    if (top) {
      const index = new Uint32Array(this.#frames * this.#frame.rows * top.k);
      const value = new Float32Array(index.length);
      await inflate(top.index, new Uint8Array(index.buffer), () => {});
      await inflate(top.value, new Uint8Array(value.buffer), () => {});
      this.#top = { index, value };
    }
    this.complete = true;
  }

  /** Wait until the first `bytes` of the sheets have arrived. */
  until(bytes: number): Promise<void> {
    if (this.#arrived >= bytes) return Promise.resolve();
    return new Promise((resolve) => this.#waiting.push({ bytes, resolve }));
  }

  /** Return the number of bytes up to the end of a sheet. */
  end(place: Place): number {
    const { rows, columns } = this.#shape(place);
    return (this.#position(place, "cells", rows * columns) + rows * columns) * this.#width;
  }

  /** Return the values of one head; those of "levels" are decoded on each call. */
  sheet(place: Place): Sheet {
    const { rows, columns } = this.#shape(place);
    const start = this.#position(place, "cells", rows * columns);
    if (this.payload.encoding === "float32") return sheetOver(this.#values.buffer, start * 4, rows, columns);
    const levels = this.#values.subarray(start, start + rows * columns);
    const table = new Uint32Array(levelTable(...this.range(place)).buffer);
    const bits = new Uint32Array(levels.length);
    for (let i = 0; i < levels.length; i++) bits[i] = table[levels[i]];
    return sheetOver(bits.buffer, 0, rows, columns);
  }

  /** Return the lowest and the highest finite value of one head. */
  range(place: Place): [number, number] {
    const i = 2 * this.#position(place, "sheets", 1);
    return [this.#ranges[i], this.#ranges[i + 1]];
  }

  /** Return the exact largest values of the true rows `[from, to)`, largest first; none where nothing is pooled. */
  largest(place: Place, from: number, to: number): Largest[] {
    if (!this.#top || !this.payload.top) return [];
    const { k } = this.payload.top;
    const layer = this.layer(place);
    const start = this.#position(place, "rows", layer.rows);
    const found: Largest[] = [];
    for (let row = from; row < Math.min(to, layer.rows); row++) {
      for (let i = (start + row) * k; i < (start + row + 1) * k; i++) {
        const column = this.#top.index[i];
        if (column !== NO_COLUMN) found.push({ row, column, value: this.#top.value[i] });
      }
    }
    return found.sort((a, b) => b.value - a.value);
  }

  /** Return the description of a head's layer. */
  layer(place: { kind: number; layer: number }): Layer {
    return this.payload.kinds[place.kind].layers[place.layer];
  }

  #shape(place: Place): { rows: number; columns: number } {
    const [rows, columns] = this.layer(place).shape;
    return { rows, columns };
  }

  #position(place: Place, unit: keyof Offset, perHead: number): number {
    const frame = place.run * this.payload.frames.length + place.frame;
    return frame * this.#frame[unit] + this.#offsets[place.kind][place.layer][unit] + place.head * perHead;
  }

  get #frames(): number {
    return this.payload.runs.length * this.payload.frames.length;
  }

  get #width(): number {
    return this.payload.encoding === "float32" ? 4 : 1;
  }

  #arrive(bytes: number): void {
    this.#arrived = bytes;
    for (const { resolve } of this.#waiting.filter((waiting) => waiting.bytes <= bytes)) resolve();
    this.#waiting = this.#waiting.filter((waiting) => waiting.bytes > bytes);
  }

  #advance(layer: Layer): Offset {
    const before = { ...this.#frame };
    this.#frame.cells += layer.heads * layer.shape[0] * layer.shape[1];
    this.#frame.sheets += layer.heads;
    this.#frame.rows += layer.heads * layer.rows;
    return before;
  }
}

/** Return the value of each of the 256 levels, for a sheet whose finite values lie in [low, high]. */
export function levelTable(low: number, high: number): Float32Array<ArrayBuffer> {
  const table = new Float32Array(256);
  const { highest } = LEVELS;
  const middle = highest / 2;
  const most = Math.max(Math.abs(low), Math.abs(high));
  for (let c = 0; c <= highest; c++) {
    table[c] = low >= 0 ? high * (c / highest) ** 2 : Math.sign(c - middle) * most * ((c - middle) / middle) ** 2;
  }
  table[LEVELS.nan] = NaN;
  table[LEVELS.positive] = Infinity;
  table[LEVELS.negative] = -Infinity;
  // Only the bits tell a masked cell from NaN, and storing it as a float may change them.
  new Uint32Array(table.buffer)[LEVELS.masked] = MASKED;
  return table;
}

function expectLength(right: boolean, given: number, expected: number): void {
  if (!right) throw new Error(`an array of the page has ${given} bytes or more, but its layers need ${expected}`);
}
