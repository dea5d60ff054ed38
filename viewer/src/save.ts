/** Saving the map as PNG or SVG. */
import { fileName } from "./names";
import { paintMap, type Picture } from "./paint";
import { raster } from "./raster";

const SVG = "http://www.w3.org/2000/svg";
const LARGEST = 8192;
const LABEL = 11;

/** Save the whole map, with its axes, as pixels. */
export function savePng(picture: Picture, name: string[]): void {
  const { width, height } = picture.room;
  const ratio = Math.min(Math.max(2, picture.ratio), LARGEST / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d")!;
  context.scale(ratio, ratio);
  paintMap(context, picture);
  canvas.toBlob((blob) => blob && download(blob, fileName(name, ".png")), "image/png");
}

/** Save the whole map as SVG: the cells as one image without smoothing, the names as text. */
export function saveSvg(picture: Picture, name: string[]): void {
  const text = new XMLSerializer().serializeToString(makeSvg(picture));
  download(new Blob([text], { type: "image/svg+xml" }), fileName(name, ".svg"));
}

/** Build the SVG of a map. */
export function makeSvg(picture: Picture): SVGElement {
  const { layout, labels, theme, room } = picture;
  const svg = node("svg", { viewBox: `0 0 ${room.width} ${room.height}`, width: room.width, height: room.height });
  svg.append(node("rect", { width: room.width, height: room.height, fill: theme.surface }));
  const group = node("g", { "font-family": "system-ui, sans-serif", "font-size": LABEL, fill: theme.ink });
  const width = layout.columns * layout.cellWidth;
  const height = layout.rows * layout.cellHeight;
  const image = { href: cellsUrl(picture), x: layout.left, y: layout.top, width, height };
  svg.append(node("image", { ...image, preserveAspectRatio: "none", "image-rendering": "pixelated" }), group);
  const rowStep = Math.ceil((LABEL + 2) / layout.cellHeight);
  for (let i = 0; i < layout.rows; i += rowStep) {
    const y = layout.top + (i + 0.5) * layout.cellHeight;
    group.append(label(labels.row(i), { x: layout.left - 6, y, "text-anchor": "end" }));
  }
  const widest = labels.turned ? 1 : Math.max(...[0, layout.columns - 1].map((i) => labels.column(i).length)) * 7;
  const columnStep = Math.ceil(Math.max(LABEL + 2, widest) / layout.cellWidth);
  for (let i = 0; i < layout.columns; i += columnStep) {
    const x = layout.left + (i + 0.5) * layout.cellWidth;
    const y = layout.top - 6;
    const text = label(labels.column(i), { x, y });
    if (labels.turned) text.setAttribute("transform", `rotate(-90 ${x} ${y})`);
    else text.setAttribute("text-anchor", "middle");
    group.append(text);
  }
  group.append(label(`${labels.columns} →`, { x: layout.left, y: 10, "font-weight": 600 }));
  const turned = `rotate(-90 10 ${layout.top})`;
  group.append(
    label(`← ${labels.rows}`, { x: 10, y: layout.top, transform: turned, "text-anchor": "end", "font-weight": 600 }),
  );
  return svg;
}

function cellsUrl({ sheet, scale, theme }: Picture): string {
  const canvas = document.createElement("canvas");
  canvas.width = sheet.columns;
  canvas.height = sheet.rows;
  const pixels = raster(sheet, { row: 0, column: 0, rows: sheet.rows, columns: sheet.columns }, scale, theme.palette);
  canvas.getContext("2d")!.putImageData(new ImageData(pixels, sheet.columns, sheet.rows), 0, 0);
  return canvas.toDataURL("image/png");
}

function label(text: string, attributes: Record<string, string | number>): SVGElement {
  const element = node("text", { "dominant-baseline": "central", ...attributes });
  element.textContent = text;
  return element;
}

function node(tag: string, attributes: Record<string, string | number>): SVGElement {
  const element = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  return element;
}

function download(blob: Blob, name: string): void {
  const url = URL.createObjectURL(blob);
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
