/** Text of tokens and numbers, made safe and visible. No DOM. */
import type { Axis } from "./payload";

const NAMED: Record<string, string> = { " ": "␣", "\n": "⏎", "\t": "⇥" };
// A zero-width joiner is not among them: it holds emoji together.
const HIDDEN = new RegExp(
  [
    "[\\0-\\x20\\x7f-\\xa0\\xad\\u034f\\u115f\\u1160\\u3164\\ufff9-\\ufffb]", // controls, blanks
    "[\\u1680\\u180e\\u2000-\\u200c\\u2028\\u2029\\u202f\\u205f-\\u2065\\u3000\\ufeff]", // spaces, without width too
    "[\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u206f]", // what turns the direction of the rest
    "[\\ud800-\\udbff](?![\\udc00-\\udfff])|(?<![\\ud800-\\udbff])[\\udc00-\\udfff]", // half of a character
  ].join("|"),
  "g",
);

/** Return a token as text in which every character shows, cut to about `most` of them; "∅" if it is empty. */
export function visible(token: string, most = 200): string {
  if (token === "") return "∅";
  // Twice as many units: a character may have two, and a cut one must lie beyond the ellipsis.
  const text = token.slice(0, 2 * most + 2).replace(HIDDEN, (unit) => NAMED[unit] ?? escape(unit));
  // A combining mark needs something to stand on.
  return elide(/^\p{M}/u.test(text) ? "◌" + text : text, most);
}

/** Return a text of words, such as a title, with its spaces as they are and other hidden characters made visible. */
export function readable(text: string): string {
  return text.replace(HIDDEN, (unit) => (/[ \n\t]/.test(unit) ? " " : escape(unit)));
}

/** Return the text cut to `most` characters, with an ellipsis if it was longer. */
export function elide(text: string, most: number): string {
  if (text.length <= most) return text;
  const characters = Array.from(text);
  return characters.length <= most ? text : characters.slice(0, most - 1).join("") + "…";
}

/** Return the name of a stored cell along an axis: of one token, or of the first and last that it stands for. */
export function cellName(axis: Axis, cell: number, block: number, size: number, most = 24): string {
  const first = cell * block;
  const last = Math.min(first + block, size) - 1;
  if (!axis.names) return first === last ? String(first) : `${first}–${last}`;
  // Layers may have more positions than there are names.
  const name = (i: number, length: number) => visible(axis.names![i] ?? String(i), length);
  return first === last ? name(first, most) : `${name(first, most >> 1)} … ${name(last, most >> 1)}`;
}

/** Return the label of a stored cell on an axis: its name, or the first of its numbers. */
export function tickName(axis: Axis, cell: number, block: number, size: number): string {
  return axis.names ? cellName(axis, cell, block, size) : String(cell * block);
}

/** Return the number of a stored cell, and its name in quotes if it has one: `3 'cat'`. */
export function describeCell(axis: Axis, cell: number, block: number, size: number): string {
  const first = cell * block;
  const last = Math.min(first + block, size) - 1;
  const number = first === last ? String(first) : `${first}–${last}`;
  return axis.names ? `${number} '${cellName(axis, cell, block, size, 60)}'` : number;
}

/** Return a number with at most four significant digits. */
export function formatNumber(value: number): string {
  if (value !== value) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "+∞" : "−∞";
  const size = Math.abs(value);
  const plain = size === 0 || (size >= 0.001 && size < 1e5);
  return (plain ? String(Number(value.toPrecision(4))) : value.toExponential(2)).replaceAll("-", "−");
}

/** Return a file name of letters, digits, dots and dashes. */
export function fileName(parts: string[], ending: string): string {
  const name = parts
    .join("-")
    .normalize("NFKD")
    .replace(/[^A-Za-z0-9.]+/g, "-");
  return (name.replace(/^[-.]+|[-.]+$/g, "").slice(0, 80) || "attention") + ending;
}

function escape(unit: string): string {
  const hex = unit.charCodeAt(0).toString(16);
  return hex.length <= 2 ? "\\x" + hex.padStart(2, "0") : "\\u" + hex.padStart(4, "0");
}
