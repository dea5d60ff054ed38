/** Painting a map with its axes: for the page, and for a saved picture. */
import type { Theme } from "./app";
import { fitText, FONT } from "./dom";
import { LARGEST_FIT, labelStep, type MapLayout } from "./layout";
import { raster, type Region, type Scale } from "./raster";
import type { Sheet } from "./sheet";

/** What is painted. Names are of shown cells; `cross` and `scroll` are numbers of shown cells and pixels. */
export interface Picture {
  sheet: Sheet;
  scale: Scale;
  theme: Theme;
  layout: MapLayout;
  labels: AxisLabels;
  scroll: { x: number; y: number };
  room: { width: number; height: number };
  cross: { row: number; column: number; pinned: boolean } | null;
  ratio: number;
}

/** Names of the cells along both axes, and what the axes are. */
export interface AxisLabels {
  row(i: number): string;
  column(i: number): string;
  rows: string;
  columns: string;
  turned: boolean;
}

const LINE = 15;
const TITLE = 20;
const WIDEST = 118;
/** Lines around cells may lie this far outside of them. */
const EDGE = 2;

/** Return the room that labels need to the left and above, and whether those above are turned by 90 degrees. */
export function measureLabels(
  context: CanvasRenderingContext2D,
  rows: { count: number; name(i: number): string },
  columns: { count: number; name(i: number): string },
  room: { width: number; height: number },
): { left: number; top: number; turned: boolean } {
  context.font = FONT;
  const widest = (axis: { count: number; name(i: number): string }) => {
    const step = Math.max(1, Math.ceil(axis.count / 300));
    let width = 0;
    for (let i = 0; i < axis.count; i += step) width = Math.max(width, context.measureText(axis.name(i)).width);
    return width + 8;
  };
  const left = TITLE + Math.min(Math.max(widest(rows), 22), WIDEST, room.width * 0.3);
  const columnWidth = widest(columns);
  const cell = Math.min((room.width - left) / columns.count, LARGEST_FIT);
  const turned = columnWidth > Math.max(cell, 30);
  const top = TITLE + (turned ? Math.min(columnWidth, WIDEST, room.height * 0.4) : LINE + 3);
  return { left: Math.ceil(left), top: Math.ceil(top), turned };
}

/** Paint the part of a map that is in view: cells, labels of both axes, and the lines around the chosen cell. */
export function paintMap(context: CanvasRenderingContext2D, picture: Picture): void {
  const { room, theme } = picture;
  context.fillStyle = theme.surface;
  context.fillRect(0, 0, room.width, room.height);
  paintCells(context, picture);
  if (picture.cross) paintCross(context, picture);
  paintLabels(context, picture);
}

/** Return the part of the map that is in view. */
export function visibleRegion({ layout, scroll, room }: Picture): Region {
  const row = Math.min(Math.floor(scroll.y / layout.cellHeight), layout.rows - 1);
  const column = Math.min(Math.floor(scroll.x / layout.cellWidth), layout.columns - 1);
  const rows = Math.ceil((room.height - layout.top + (scroll.y % layout.cellHeight)) / layout.cellHeight);
  const columns = Math.ceil((room.width - layout.left + (scroll.x % layout.cellWidth)) / layout.cellWidth);
  return {
    row,
    column,
    rows: Math.max(1, Math.min(rows, layout.rows - row)),
    columns: Math.max(1, Math.min(columns, layout.columns - column)),
  };
}

function paintCells(context: CanvasRenderingContext2D, picture: Picture): void {
  const { sheet, scale, theme, layout, scroll } = picture;
  const region = visibleRegion(picture);
  const pixels = raster(sheet, region, scale, theme.palette);
  const cells = document.createElement("canvas");
  cells.width = region.columns;
  cells.height = region.rows;
  cells.getContext("2d")!.putImageData(new ImageData(pixels, region.columns, region.rows), 0, 0);
  const x = layout.left + region.column * layout.cellWidth - scroll.x;
  const y = layout.top + region.row * layout.cellHeight - scroll.y;
  const [width, height] = [region.columns * layout.cellWidth, region.rows * layout.cellHeight];
  context.imageSmoothingEnabled = false;
  context.save();
  context.beginPath();
  context.rect(layout.left, layout.top, picture.room.width, picture.room.height);
  context.clip();
  context.drawImage(cells, x, y, width, height);
  context.restore();
  context.strokeStyle = theme.line;
  context.lineWidth = 1;
  context.strokeRect(layout.left - 0.5, layout.top - 0.5, x + width - layout.left + 1, y + height - layout.top + 1);
}

function paintCross(context: CanvasRenderingContext2D, picture: Picture): void {
  const { layout, scroll, cross, theme, room } = picture;
  const x = layout.left + cross!.column * layout.cellWidth - scroll.x;
  const y = layout.top + cross!.row * layout.cellHeight - scroll.y;
  const right = Math.min(layout.left + layout.columns * layout.cellWidth - scroll.x, room.width);
  const bottom = Math.min(layout.top + layout.rows * layout.cellHeight - scroll.y, room.height);
  context.save();
  context.beginPath();
  context.rect(layout.left - EDGE, layout.top - EDGE, room.width, room.height);
  context.clip();
  context.strokeStyle = theme.accent;
  context.lineWidth = cross!.pinned ? 2 : 1;
  // Half a pixel, so that lines are sharp; they lie outside of the cells' centres.
  strokeBand(context, layout.left, y, right, y + layout.cellHeight);
  context.lineWidth = 1;
  strokeBand(context, x, layout.top, x + layout.cellWidth, bottom);
  context.lineWidth = 2;
  context.strokeRect(x - 1, y - 1, layout.cellWidth + 2, layout.cellHeight + 2);
  context.restore();
}

function strokeBand(context: CanvasRenderingContext2D, left: number, top: number, right: number, bottom: number): void {
  context.strokeRect(left - 0.5, top - 0.5, right - left + 1, bottom - top + 1);
}

function paintLabels(context: CanvasRenderingContext2D, picture: Picture): void {
  const { layout, room, theme, labels } = picture;
  context.fillStyle = theme.surface;
  context.fillRect(0, 0, layout.left - EDGE, room.height);
  context.fillRect(0, 0, room.width, layout.top - EDGE);
  context.font = FONT;
  context.textBaseline = "middle";
  paintAxis(context, picture, "rows");
  paintAxis(context, picture, "columns");
  context.fillStyle = theme.muted;
  context.textAlign = "left";
  context.font = "600 " + FONT;
  context.fillText(fitText(context, `${labels.columns} →`, room.width - layout.left), layout.left, 9);
  context.save();
  context.translate(9, layout.top);
  context.rotate(-Math.PI / 2);
  context.textAlign = "right";
  context.fillText(fitText(context, `← ${labels.rows}`, room.height - layout.top), 0, 0);
  context.restore();
}

/** Paint the names along one axis, every k-th where all would overlap, and always that of the chosen cell. */
function paintAxis(context: CanvasRenderingContext2D, picture: Picture, axis: "rows" | "columns"): void {
  const { layout, labels, cross } = picture;
  const region = visibleRegion(picture);
  const isRow = axis === "rows";
  const cell = isRow ? layout.cellHeight : layout.cellWidth;
  const [first, count] = isRow ? [region.row, region.rows] : [region.column, region.columns];
  const name = isRow ? labels.row : labels.column;
  const chosen = cross ? (isRow ? cross.row : cross.column) : -1;
  let needed = LINE;
  if (!isRow && !labels.turned) {
    for (let i = first; i < first + count; i += 1 + (count >> 7)) {
      needed = Math.max(needed, context.measureText(name(i)).width + 6);
    }
  }
  const step = labelStep(cell, needed);
  for (let i = Math.ceil(first / step) * step; i < first + count; i += step) {
    const crowded = chosen >= first && i !== chosen && Math.abs(i - chosen) * cell < needed;
    if (!crowded) paintLabel(context, picture, isRow, i, name(i), i === chosen);
  }
  if (chosen % step !== 0 && chosen >= first && chosen < first + count) {
    paintLabel(context, picture, isRow, chosen, name(chosen), true);
  }
}

function paintLabel(
  context: CanvasRenderingContext2D,
  { layout, labels, scroll, theme }: Picture,
  isRow: boolean,
  i: number,
  text: string,
  chosen: boolean,
): void {
  const start = isRow ? layout.top - scroll.y : layout.left - scroll.x;
  const at = start + (i + 0.5) * (isRow ? layout.cellHeight : layout.cellWidth);
  if (at < (isRow ? layout.top : layout.left) - 1) return;
  context.fillStyle = chosen ? theme.accent : theme.ink;
  context.font = chosen ? "600 " + FONT : FONT;
  context.save();
  if (isRow) {
    context.textAlign = "right";
    context.fillText(fitText(context, text, layout.left - TITLE - 4), layout.left - 6, at);
  } else if (labels.turned) {
    context.translate(at, layout.top - 6);
    context.rotate(-Math.PI / 2);
    context.textAlign = "left";
    context.fillText(fitText(context, text, layout.top - TITLE - 4), 0, 0);
  } else {
    context.textAlign = "center";
    context.fillText(text, at, layout.top - 11);
  }
  context.restore();
  context.font = FONT;
}
