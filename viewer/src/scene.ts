/** From the view to the sheets that it shows: aggregates, hidden rows and columns, differences, colours. No DOM. */
import type { Data, Kind, Layer, Payload, Place } from "./payload";
import { ownScale, type Scale } from "./raster";
import { difference, hiddenMass, overHeads, rolloutStep, select, type Sheet, survey, type Survey } from "./sheet";
import { type HeadPlace, hasMass, kept, kindOf, layerOf, mappingOf, rangeOf, type View } from "./state";

/** Which sheet of a head: of the first run, of the second, or second - first. */
export type Source = "first" | "second" | "difference";

/** What a view shows, short of numbers: stored rows and columns that are not hidden, and the crosshair among them. */
export interface Shown {
  kind: Kind;
  layer: Layer;
  rows: Int32Array;
  columns: Int32Array;
  row: number;
  column: number;
  sources: Source[];
}

/** Return what a view shows; side by side, there are two sources. */
export function shownOf(view: View, payload: Payload): Shown {
  const { rows, columns } = kept(view, payload);
  return {
    kind: kindOf(view, payload),
    layer: layerOf(view, payload),
    rows,
    columns,
    row: rows.indexOf(view.row),
    column: columns.indexOf(view.column),
    sources: view.compare === "both" ? ["first", "second"] : [view.compare],
  };
}

/** Cells that derived sheets may keep in memory, 4 bytes each. */
const CACHE_CELLS = 8e6;

/** Sheets of one payload, the derived ones kept while there is room. */
export class Scene {
  readonly #cache = new Map<string, Sheet>();
  #surveys = new WeakMap<Sheet, Survey>();
  readonly #commons = new Map<string, Pick<Survey, "low" | "high">>();

  constructor(readonly data: Data) {}

  /** Return the bytes of sheets that must have arrived to show a view. */
  needs(view: View): number {
    if (view.show !== "head") return this.data.size;
    return this.data.end(placeOf(view, view.compare === "first" ? 0 : this.data.payload.runs.length - 1, view));
  }

  /** Forget what was computed before all sheets had arrived. */
  forget(): void {
    this.#cache.clear();
    this.#commons.clear();
    this.#surveys = new WeakMap();
  }

  /** Return what the view shows as one large map: the head, or an aggregate of its layer; without hidden parts. */
  shown(view: View, source: Source): Sheet {
    const key = JSON.stringify([
      view.show,
      source,
      view.frame,
      view.kind,
      view.layer,
      view.show === "head" && view.head,
    ]);
    return this.#keep(key + this.#hiddenKey(view), () =>
      this.#combine(view, source, (run) => this.#hide(view, view.layer, this.whole(view, run))),
    );
  }

  /** Return one head as the overview shows it. */
  head(view: View, source: Source, place: HeadPlace): Sheet {
    return this.#combine(view, source, (run) =>
      this.#hide(view, place.layer, this.data.sheet(placeOf(view, run, place))),
    );
  }

  /** Return the sums of the hidden columns of each shown row; null if nothing is hidden or rows have no mass. */
  hidden(view: View, run: number): Float64Array | null {
    const { rows, columns } = kept(view, this.data.payload);
    if (!hasMass(view, this.data.payload) || columns.length === layerOf(view, this.data.payload).shape[1]) return null;
    return hiddenMass(this.whole(view, run), rows, columns);
  }

  /** Return the range of a sheet and the kinds of its cells. */
  survey(sheet: Sheet): Survey {
    let found = this.#surveys.get(sheet);
    if (!found) this.#surveys.set(sheet, (found = survey(sheet)));
    return found;
  }

  /** Return how the numbers of a sheet become colours. */
  scale(view: View, source: Source, sheet: Sheet): Scale {
    const mapping = mappingOf(view, this.data.payload);
    const own = ownScale(this.survey(sheet), mapping);
    if (source === "difference") own.signed = true;
    const range = rangeOf(view, this.data.payload);
    if (range === "head") return own;
    if (range === "unit") return { ...own, most: 1 };
    const common = ownScale(this.#common(view, source), mapping);
    return { ...common, signed: common.signed || own.signed };
  }

  /** Return the head, or the aggregate of its layer, with nothing hidden. */
  whole(view: View, run: number): Sheet {
    if (view.show === "head") return this.data.sheet(placeOf(view, run, view));
    if (view.show === "rollout") return this.#rollout(view, run, view.layer);
    return this.#overHeads(view, run, view.layer, view.show);
  }

  #overHeads(view: View, run: number, layer: number, how: "mean" | "max"): Sheet {
    return this.#keep(JSON.stringify([how, run, view.frame, view.kind, layer]), () => {
      const { heads } = kindOf(view, this.data.payload).layers[layer];
      const sheets = Array.from({ length: heads }, (_, head) => this.data.sheet(placeOf(view, run, { layer, head })));
      return overHeads(sheets, how);
    });
  }

  #rollout(view: View, run: number, layer: number): Sheet {
    return this.#keep(JSON.stringify(["rollout", run, view.frame, view.kind, layer]), () => {
      const before = layer > 0 ? this.#rollout(view, run, layer - 1) : null;
      return rolloutStep(before, this.#overHeads(view, run, layer, "mean"));
    });
  }

  #combine(view: View, source: Source, sheetOf: (run: number) => Sheet): Sheet {
    if (source !== "difference") return sheetOf(source === "first" ? 0 : 1);
    const { quantity } = kindOf(view, this.data.payload);
    return difference(sheetOf(0), sheetOf(1), quantity === "weights" || quantity === "mask");
  }

  #hide(view: View, layer: number, sheet: Sheet): Sheet {
    const { rows, columns } = kept(view, this.data.payload, layer);
    const allColumns = columns.length === sheet.columns;
    if (rows.length === sheet.rows && allColumns) return sheet;
    return select(sheet, rows, columns, view.renormalise && !allColumns && hasMass(view, this.data.payload));
  }

  /** Range over all heads of the kind and frame, nothing hidden; of both runs, so that they can be compared. */
  #common(view: View, source: Source): Pick<Survey, "low" | "high"> {
    const key = JSON.stringify([source === "difference", view.frame, view.kind]);
    let found = this.#commons.get(key);
    if (!found) {
      found = { low: 0, high: 0 };
      kindOf(view, this.data.payload).layers.forEach((layer, i) => {
        for (let head = 0; head < layer.heads; head++) this.#extend(found!, view, source, { layer: i, head });
      });
      this.#commons.set(key, found);
    }
    return found;
  }

  #extend(range: Pick<Survey, "low" | "high">, view: View, source: Source, place: HeadPlace): void {
    const ranges =
      source === "difference"
        ? [this.#differenceRange(view, place)]
        : this.data.payload.runs.map((_, run) => this.data.range(placeOf(view, run, place)));
    for (const [low, high] of ranges) {
      range.low = Math.min(range.low, low);
      range.high = Math.max(range.high, high);
    }
  }

  #differenceRange(view: View, place: HeadPlace): [number, number] {
    const { low, high } = survey(
      this.#combine(view, "difference", (run) => this.data.sheet(placeOf(view, run, place))),
    );
    return [low, high];
  }

  #hiddenKey(view: View): string {
    return JSON.stringify([view.hiddenRows[view.kind], view.hiddenColumns[view.kind], view.renormalise]);
  }

  #keep(key: string, compute: () => Sheet): Sheet {
    const sheet = this.#cache.get(key) ?? compute();
    // The last used are last; the first are dropped when there is no room.
    this.#cache.delete(key);
    this.#cache.set(key, sheet);
    let cells = 0;
    for (const kept of this.#cache.values()) cells += kept.values.length;
    for (const [old, dropped] of this.#cache) {
      if (cells <= CACHE_CELLS || old === key) break;
      cells -= dropped.values.length;
      this.#cache.delete(old);
    }
    return sheet;
  }
}

/** Return the place of a head in the frame and kind of the view. */
export function placeOf(view: View, run: number, { layer, head }: HeadPlace): Place {
  return { run, frame: view.frame, kind: view.kind, layer, head };
}
