/** Payloads and sheets for tests. */
import type { Kind, Layer, Payload } from "../src/payload";
import { MASKED, type Sheet, zeros } from "../src/sheet";

/** Stands for a masked cell in `sheetOf`. */
export const HIDE = "masked";

/** Return a sheet of the rows given. */
export function sheetOf(rows: (number | typeof HIDE)[][]): Sheet {
  const sheet = zeros(rows.length, rows[0].length);
  rows.flat().forEach((value, i) => {
    if (value === HIDE) sheet.bits[i] = MASKED;
    else sheet.values[i] = value;
  });
  return sheet;
}

/** Return base64 of gzip. */
export async function pack(bytes: ArrayBuffer | Uint8Array<ArrayBuffer>): Promise<string> {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("gzip"));
  return btoa(String.fromCharCode(...new Uint8Array(await new Response(stream).arrayBuffer())));
}

/** Return a layer; `block` is 1 x 1 unless given. */
export function makeLayer(heads: number, rows: number, columns: number, block: [number, number] = [1, 1]): Layer {
  const shape: [number, number] = [Math.ceil(rows / block[0]), Math.ceil(columns / block[1])];
  return { name: "layer", heads, rows, columns, block, shape, reduce: block[0] * block[1] > 1 ? "mass" : "none" };
}

/** Return a kind of weights. */
export function makeKind(layers: Layer[], change: Partial<Kind> = {}): Kind {
  const axis = { label: "query", names: null };
  const base: Kind = {
    name: "attention",
    title: "Attention",
    rows: axis,
    columns: { ...axis, label: "key" },
    layers,
    groups: null,
    quantity: "weights",
    picture: null,
  };
  return { ...base, ...change };
}

/** Return a payload without numbers. */
export function makePayload(kinds: Kind[], change: Partial<Payload> = {}): Payload {
  const base: Payload = {
    version: 1,
    title: "",
    note: "",
    encoding: "float32",
    runs: ["one"],
    frames: ["now"],
    kinds,
    measures: [],
    values: "",
    ranges: "",
    top: null,
  };
  return { ...base, ...change };
}
