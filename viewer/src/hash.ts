/** The view as text for the address of the page, and back; nothing in an address is trusted. No DOM. */
import { COMPARISONS, MAPPINGS, RANGES, SHOWS, TABS, THEMES, type View } from "./state";

const NUMBERS = ["kind", "layer", "head", "frame", "row", "column", "zoom"] as const;
const CHOICES = {
  show: SHOWS,
  range: RANGES,
  mapping: MAPPINGS,
  compare: COMPARISONS,
  tab: TABS,
  theme: THEMES,
} as const;
const LONGEST = 2000;

/** Return what differs from `initial`, as the text after "#". */
export function toHash(view: View, initial: View): string {
  const parts = new URLSearchParams();
  for (const key of [...NUMBERS, ...(Object.keys(CHOICES) as (keyof typeof CHOICES)[]), "order" as const]) {
    if (view[key] !== initial[key] && view[key] !== null) parts.set(key, String(view[key]));
  }
  if (view.renormalise !== initial.renormalise) parts.set("renormalise", String(view.renormalise));
  if (view.hiddenRows[view.kind]) parts.set("rows", view.hiddenRows[view.kind]);
  if (view.hiddenColumns[view.kind]) parts.set("columns", view.hiddenColumns[view.kind]);
  return parts.toString();
}

/** Return `initial` with the choices that a text names; unknown ones are left out. `settle` must follow. */
export function fromHash(text: string, initial: View): View {
  const parts = new URLSearchParams(text.replace(/^#/, "").slice(0, LONGEST));
  const view: View = { ...initial };
  for (const key of NUMBERS) {
    const value = parts.get(key);
    if (value !== null && /^\d{1,9}$/.test(value)) view[key] = Number(value);
  }
  for (const [key, allowed] of Object.entries(CHOICES)) {
    const value = parts.get(key);
    if ((allowed as readonly (string | null)[]).includes(value)) Object.assign(view, { [key]: value });
  }
  if (/^\d{1,4} (up|down)$/.test(parts.get("order") ?? "")) view.order = parts.get("order")!;
  if (parts.has("renormalise")) view.renormalise = parts.get("renormalise") === "true";
  if (view.kind < initial.hiddenRows.length) {
    view.hiddenRows = withRanges(initial.hiddenRows, view.kind, parts.get("rows"));
    view.hiddenColumns = withRanges(initial.hiddenColumns, view.kind, parts.get("columns"));
  }
  view.zoom = Math.min(view.zoom, 20);
  return view;
}

function withRanges(all: string[], kind: number, text: string | null): string[] {
  return text && /^[\d\s,–-]+$/.test(text) ? all.map((old, i) => (i === kind ? text : old)) : all;
}
