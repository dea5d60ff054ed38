/** Numbers to pixels. No DOM: results are the bytes of an ImageData. */
import type { Packed, Palette } from "./palette";
import { MASKED, type Sheet, type Survey } from "./sheet";

export type Mapping = "linear" | "root" | "log";

/** How numbers become colours. `most` has the last colour; if `signed`, -most has the first and 0 the middle one. */
export interface Scale {
  most: number;
  signed: boolean;
  mapping: Mapping;
}

/** Rows `[row, row + rows)` and columns `[column, column + columns)` of a sheet. */
export interface Region {
  row: number;
  column: number;
  rows: number;
  columns: number;
}

/** Decades below `most` that the logarithmic mapping shows; what is smaller has the colour of 0. */
export const DECADES = 4;

/** Return the position in [0, 1] of a finite number among the colours. */
export function position(value: number, scale: Scale): number {
  const size = scale.most > 0 ? Math.min(Math.abs(value) / scale.most, 1) : 0;
  let mapped = size;
  if (scale.mapping === "root") mapped = Math.sqrt(size);
  else if (scale.mapping === "log") mapped = size > 0 ? Math.max(0, 1 + Math.log10(size) / DECADES) : 0;
  if (scale.signed) return value < 0 ? 0.5 - mapped / 2 : 0.5 + mapped / 2;
  return value < 0 ? 0 : mapped;
}

/** Return the number at a position in [0, 1] among the colours: the inverse of `position`. */
export function valueAt(at: number, scale: Scale): number {
  const size = scale.signed ? Math.abs(2 * at - 1) : at;
  const sign = scale.signed && at < 0.5 ? -1 : 1;
  if (scale.mapping === "root") return sign * scale.most * size * size;
  if (scale.mapping === "log") return sign * scale.most * 10 ** (DECADES * (size - 1));
  return sign * scale.most * size;
}

/** Return the colour of cell `i` of a sheet; `parity` chooses between the greys of a masked one. */
export function colourOf(sheet: Sheet, i: number, parity: number, scale: Scale, palette: Palette): Packed {
  const value = sheet.values[i];
  if (value - value === 0) {
    const table = scale.signed ? palette.diverging : palette.sequential;
    return table[Math.round(position(value, scale) * (table.length - 1))];
  }
  if (sheet.bits[i] === MASKED) return palette.masked[parity & 1];
  if (value !== value) return palette.nan;
  return value > 0 ? palette.positive : palette.negative;
}

/** Return the pixels of a region, one per cell. */
export function raster(sheet: Sheet, region: Region, scale: Scale, palette: Palette): Uint8ClampedArray<ArrayBuffer> {
  const pixels = new Uint32Array(region.rows * region.columns);
  for (let r = 0, at = 0; r < region.rows; r++) {
    const row = region.row + r;
    const start = row * sheet.columns + region.column;
    for (let c = 0; c < region.columns; c++) {
      pixels[at++] = colourOf(sheet, start + c, row + region.column + c, scale, palette);
    }
  }
  return new Uint8ClampedArray(pixels.buffer);
}

/**
 * Return a picture of a whole sheet in width x height pixels. A pixel that stands for several cells shows the one with
 * the largest magnitude, so that a thin diagonal stays visible; NaN and infinity before any number, a masked cell last.
 */
export function thumbnail(
  sheet: Sheet,
  width: number,
  height: number,
  scale: Scale,
  palette: Palette,
): Uint8ClampedArray<ArrayBuffer> {
  const pixels = new Uint32Array(width * height);
  const columns = edges(sheet.columns, width);
  const rows = edges(sheet.rows, height);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const cell = loudest(sheet, rows[0][y], rows[1][y], columns[0][x], columns[1][x]);
      // Two pixels per grey: single ones would melt into one.
      pixels[at++] = colourOf(sheet, cell, (x >> 1) + (y >> 1), scale, palette);
    }
  }
  return new Uint8ClampedArray(pixels.buffer);
}

/** Return the scale on which the largest of the finite numbers has the last colour. */
export function ownScale(found: Pick<Survey, "low" | "high">, mapping: Mapping): Scale {
  return { most: Math.max(Math.abs(found.low), Math.abs(found.high)), signed: found.low < 0, mapping };
}

/** Return for each pixel the first cell, and the end of the cells, that it stands for. */
function edges(cells: number, pixels: number): [Int32Array, Int32Array] {
  const first = Int32Array.from({ length: pixels }, (_, i) => Math.floor((i * cells) / pixels));
  const end = Int32Array.from(first, (from, i) => Math.max(from + 1, Math.floor(((i + 1) * cells) / pixels)));
  return [first, end];
}

function loudest(sheet: Sheet, fromRow: number, toRow: number, fromColumn: number, toColumn: number): number {
  const { values, bits } = sheet;
  let best = fromRow * sheet.columns + fromColumn;
  let most = -1;
  for (let row = fromRow; row < toRow; row++) {
    const start = row * sheet.columns;
    for (let i = start + fromColumn; i < start + toColumn; i++) {
      const size = Math.abs(values[i]);
      if (size > most) {
        most = size;
        best = i;
      } else if (size !== size && bits[i] !== MASKED) return i;
    }
  }
  return best;
}
