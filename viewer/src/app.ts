/** What every part of the page shares. */
import type { Data } from "./payload";
import { DARK_PALETTE, LIGHT_PALETTE, type Palette } from "./palette";
import { describeCell } from "./names";
import type { Scene, Shown } from "./scene";
import type { View } from "./state";

/** The data, the view, and the way to change it. */
export interface App {
  readonly data: Data;
  readonly scene: Scene;
  readonly view: View;
  /** What the view shows, found once per view. */
  readonly shown: Shown;
  readonly theme: Theme;
  update(change: Partial<View>): void;
  /** Draw what has changed now, not with the next frame. */
  flush(): void;
}

/** A part of the page: its element, and how it follows the view. */
export interface Part {
  readonly element: HTMLElement;
  render(): void;
}

/** Colours of the canvases; those of text and lines are the page's. */
export interface Theme {
  dark: boolean;
  palette: Palette;
  surface: string;
  ink: string;
  muted: string;
  line: string;
  accent: string;
}

/** Set the page's theme and return its colours. */
export function applyTheme(choice: View["theme"]): Theme {
  const dark = choice === "auto" ? matchMedia("(prefers-color-scheme: dark)").matches : choice === "dark";
  const root = document.documentElement;
  root.dataset.theme = dark ? "dark" : "light";
  const style = getComputedStyle(root);
  const colour = (name: string) => style.getPropertyValue("--" + name).trim();
  return {
    dark,
    palette: dark ? DARK_PALETTE : LIGHT_PALETTE,
    surface: colour("surface"),
    ink: colour("ink"),
    muted: colour("muted"),
    line: colour("line"),
    accent: colour("accent"),
  };
}

/** Name a stored row or column in words: `3 'cat'`. */
export function cellText({ shown }: App, side: "rows" | "columns", cell: number): string {
  return describeCell(shown.kind[side], cell, shown.layer.block[side === "rows" ? 0 : 1], shown.layer[side]);
}
