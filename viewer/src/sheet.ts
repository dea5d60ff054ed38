/** Sheets of numbers, one per head, and arithmetic on them. No DOM. */

/** The bits of the NaN that stands for a masked cell; any other NaN is a NaN. */
export const MASKED = 0x7fc0dead;

/** Row-major numbers; `bits` are those of the same memory, as arithmetic on floats may change the bits of a NaN. */
export interface Sheet {
  rows: number;
  columns: number;
  values: Float32Array;
  bits: Uint32Array;
}

/** The kinds of cells that occur in a sheet, and the range of its finite values. */
export interface Survey {
  low: number;
  high: number;
  masked: boolean;
  nan: boolean;
  positive: boolean;
  negative: boolean;
}

/** Return a sheet over memory that exists, without a copy. */
export function sheetOver(buffer: ArrayBuffer, offset: number, rows: number, columns: number): Sheet {
  const values = new Float32Array(buffer, offset, rows * columns);
  return { rows, columns, values, bits: new Uint32Array(buffer, offset, rows * columns) };
}

/** Return a sheet of zeros. */
export function zeros(rows: number, columns: number): Sheet {
  return sheetOver(new ArrayBuffer(rows * columns * 4), 0, rows, columns);
}

/** Return the range of the finite values (0, 0 if there are none), and which other cells occur. */
export function survey(sheet: Sheet): Survey {
  const found: Survey = { low: Infinity, high: -Infinity, masked: false, nan: false, positive: false, negative: false };
  const { values, bits } = sheet;
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    if (value - value === 0) {
      if (value < found.low) found.low = value;
      if (value > found.high) found.high = value;
    } else if (bits[i] === MASKED) found.masked = true;
    else if (value !== value) found.nan = true;
    else if (value > 0) found.positive = true;
    else found.negative = true;
  }
  if (found.low > found.high) found.low = found.high = 0;
  return found;
}

/** Return the mean or the maximum over heads. Masked is 0, but a cell that is masked in all heads stays so. */
export function overHeads(heads: Sheet[], how: "mean" | "max"): Sheet {
  const result = zeros(heads[0].rows, heads[0].columns);
  for (let i = 0; i < result.values.length; i++) {
    let masked = 0;
    let total = 0;
    let most = -Infinity;
    for (const head of heads) {
      const isMasked = head.bits[i] === MASKED;
      const value = isMasked ? 0 : head.values[i];
      if (isMasked) masked++;
      total += value;
      // Math.max keeps NaN.
      most = Math.max(most, value);
    }
    if (masked === heads.length) result.bits[i] = MASKED;
    else result.values[i] = how === "mean" ? total / heads.length : most;
  }
  return result;
}

/** Return attention rollout one layer further: (0.5 mean + 0.5 I) times what came before (Abnar & Zuidema 2020). */
export function rolloutStep(before: Sheet | null, mean: Sheet): Sheet {
  const n = mean.rows;
  const result = zeros(n, n);
  for (let row = 0; row < n; row++) {
    const target = result.values.subarray(row * n, (row + 1) * n);
    for (let k = 0; k < n; k++) {
      const weight = 0.5 * numberAt(mean, row * n + k) + (k === row ? 0.5 : 0);
      if (weight === 0) continue;
      if (!before) target[k] = weight;
      else for (let column = 0, i = k * n; column < n; column++, i++) target[column] += weight * before.values[i];
    }
  }
  return result;
}

/** Return second - first. A cell masked in only one of them counts as 0 there if `maskedIsZero`, else it is masked. */
export function difference(first: Sheet, second: Sheet, maskedIsZero: boolean): Sheet {
  const result = zeros(first.rows, first.columns);
  for (let i = 0; i < result.values.length; i++) {
    const a = first.bits[i] === MASKED;
    const b = second.bits[i] === MASKED;
    if ((a && b) || ((a || b) && !maskedIsZero)) result.bits[i] = MASKED;
    else result.values[i] = numberAt(second, i) - numberAt(first, i);
  }
  return result;
}

/** Return the given rows and columns alone; if `renormalise`, each row is divided by the sum of what is left. */
export function select(sheet: Sheet, rows: Int32Array, columns: Int32Array, renormalise: boolean): Sheet {
  const result = zeros(rows.length, columns.length);
  for (let r = 0; r < rows.length; r++) {
    const start = rows[r] * sheet.columns;
    const target = r * columns.length;
    for (let c = 0; c < columns.length; c++) result.bits[target + c] = sheet.bits[start + columns[c]];
    if (renormalise) divideBySum(result.values.subarray(target, target + columns.length), result.bits.subarray(target));
  }
  return result;
}

/** Return, for each of the given rows, the sum of the finite values that are not in `columns`. */
export function hiddenMass(sheet: Sheet, rows: Int32Array, columns: Int32Array): Float64Array {
  const shown = new Uint8Array(sheet.columns);
  for (const column of columns) shown[column] = 1;
  return Float64Array.from(rows, (row) => {
    let mass = 0;
    for (let c = 0, i = row * sheet.columns; c < sheet.columns; c++, i++) {
      if (!shown[c] && Number.isFinite(sheet.values[i])) mass += sheet.values[i];
    }
    return mass;
  });
}

/** Return the columns of the `count` largest numbers of a row (by magnitude if `signed`), largest first. */
export function largestColumns(sheet: Sheet, row: number, count: number, signed = false): number[] {
  return largestOf(sheet, row * sheet.columns, 1, sheet.columns, count, signed);
}

/** Return the rows of the `count` largest numbers of a column, as `largestColumns` does. */
export function largestRows(sheet: Sheet, column: number, count: number, signed = false): number[] {
  return largestOf(sheet, column, sheet.columns, sheet.rows, count, signed);
}

function largestOf(sheet: Sheet, start: number, step: number, n: number, count: number, signed: boolean): number[] {
  const size = (i: number) => (signed ? Math.abs(sheet.values[start + i * step]) : sheet.values[start + i * step]);
  const found: number[] = [];
  for (let i = 0; i < n; i++) {
    const value = size(i);
    if (value !== value || (found.length === count && value <= size(found[count - 1]))) continue;
    let at = found.length;
    while (at > 0 && size(found[at - 1]) < value) at--;
    found.splice(at, 0, i);
    if (found.length > count) found.pop();
  }
  return found;
}

function numberAt(sheet: Sheet, i: number): number {
  return sheet.bits[i] === MASKED ? 0 : sheet.values[i];
}

function divideBySum(values: Float32Array, bits: Uint32Array): void {
  let sum = 0;
  for (const value of values) if (Number.isFinite(value)) sum += value;
  if (sum === 0) return;
  for (let i = 0; i < values.length; i++) if (bits[i] !== MASKED) values[i] /= sum;
}
