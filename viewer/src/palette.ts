/** Colours of numbers: tables of 256, with even steps of lightness, that people with any colour vision can order. */

/** Packed as the little-endian bytes of RGBA, as in the memory of an ImageData. */
export type Packed = number;

/** The colours of all that a cell may be. Masked cells alternate between two greys, which looks like a hatch. */
export interface Palette {
  sequential: Uint32Array;
  diverging: Uint32Array;
  masked: [Packed, Packed];
  nan: Packed;
  positive: Packed;
  negative: Packed;
}

/** Lightness in [0, 1], chroma, and hue in degrees, of the OKLCH space. */
type Oklch = [number, number, number];

const SIZE = 256;
const LIGHT: Oklch[] = [
  [0.985, 0.006, 235],
  [0.85, 0.07, 235],
  [0.62, 0.135, 245],
  [0.42, 0.13, 258],
  [0.24, 0.07, 268],
];
const DARK: Oklch[] = [
  [0.2, 0.03, 275],
  [0.38, 0.12, 280],
  [0.56, 0.13, 235],
  [0.76, 0.12, 180],
  [0.94, 0.13, 105],
];
const LIGHT_SIGNED: Oklch[] = [
  [0.36, 0.13, 262],
  [0.7, 0.11, 245],
  [0.98, 0, 0],
  [0.74, 0.13, 62],
  [0.44, 0.11, 48],
];
const DARK_SIGNED: Oklch[] = [
  [0.88, 0.09, 220],
  [0.58, 0.13, 250],
  [0.22, 0, 0],
  [0.58, 0.13, 50],
  [0.88, 0.11, 80],
];

/** Colours on light surfaces: more is darker; below zero is blue, above it orange. */
export const LIGHT_PALETTE: Palette = {
  sequential: table(LIGHT),
  diverging: table(LIGHT_SIGNED),
  masked: [pack(0xc9, 0xc9, 0xcc), pack(0xb9, 0xb9, 0xbd)],
  nan: pack(0xd6, 0x00, 0x8f),
  positive: pack(0x2e, 0xc0, 0x6a),
  negative: pack(0x6b, 0x3e, 0x12),
};

/** Colours on dark surfaces: more is brighter. */
export const DARK_PALETTE: Palette = {
  sequential: table(DARK),
  diverging: table(DARK_SIGNED),
  masked: [pack(0x4c, 0x4c, 0x52), pack(0x5a, 0x5a, 0x60)],
  nan: pack(0xff, 0x3d, 0xb5),
  positive: pack(0x35, 0xd0, 0x78),
  negative: pack(0xa8, 0x6a, 0x2c),
};

/** Return red, green and blue, each 0 to 255. */
export function unpack(colour: Packed): [number, number, number] {
  return [colour & 255, (colour >>> 8) & 255, (colour >>> 16) & 255];
}

/** Return the colour in the notation of CSS. */
export function css(colour: Packed): string {
  return `rgb(${unpack(colour).join(", ")})`;
}

/** Return the relative luminance in [0, 1], as WCAG defines it. */
export function luminance(colour: Packed): number {
  const [red, green, blue] = unpack(colour).map((byte) => {
    const part = byte / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

/** Return the one of black and white that is easier to read on the colour. */
export function inkOn(colour: Packed): "#000" | "#fff" {
  return luminance(colour) > 0.179 ? "#000" : "#fff";
}

function pack(red: number, green: number, blue: number): Packed {
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

/** Interpolate in OKLab, where equal steps look equal. */
function table(points: Oklch[]): Uint32Array {
  const labs = points.map(([l, c, h]) => [l, c * Math.cos((h * Math.PI) / 180), c * Math.sin((h * Math.PI) / 180)]);
  return Uint32Array.from({ length: SIZE }, (_, i) => {
    const at = (i / (SIZE - 1)) * (labs.length - 1);
    const from = Math.min(Math.floor(at), labs.length - 2);
    return fromOklab(labs[from].map((value, k) => value + (at - from) * (labs[from + 1][k] - value)));
  });
}

/** Convert OKLab to sRGB (Björn Ottosson, 2020). */
function fromOklab([lightness, a, b]: number[]): Packed {
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  const [red, green, blue] = linear.map((part) => {
    const value = Math.min(Math.max(part, 0), 1);
    return Math.round(255 * (value <= 0.0031308 ? 12.92 * value : 1.055 * value ** (1 / 2.4) - 0.055));
  });
  return pack(red, green, blue);
}
