import { fileURLToPath } from "node:url";
import { defineConfig, type Plugin } from "vite";
import { hashFolder } from "./hash.mjs";

const here = fileURLToPath(new URL(".", import.meta.url));

/** Give each output a first line with the hash of its source, and write it in ASCII. */
function stamp(): Plugin {
  const line = `/* attn viewer, sha256 of viewer/src: ${hashFolder(here + "src")} */\n`;
  return {
    name: "stamp",
    enforce: "post",
    generateBundle(_options, bundle) {
      for (const file of Object.values(bundle)) {
        if (file.type === "chunk") {
          file.code = line + ascii(file.code, (hex) => "\\u" + hex);
        } else {
          file.source = line + ascii(String(file.source), (hex) => `\\${hex} `);
        }
      }
    },
  };
}

/** Escape each UTF-16 unit that is not ASCII; outside of strings the source has none. */
function ascii(text: string, escape: (hex: string) => string): string {
  return text.replace(/[^\x00-\x7f]/g, (unit) => escape(unit.charCodeAt(0).toString(16).padStart(4, "0")));
}

export default defineConfig({
  plugins: [stamp()],
  build: {
    target: "es2022",
    cssTarget: ["chrome123", "firefox120", "safari17.5"],
    minify: true,
    outDir: here + "../attn/viewer/static",
    // The folder holds only these two files, but other files may come; never delete them.
    emptyOutDir: false,
    reportCompressedSize: false,
    lib: {
      entry: here + "src/main.ts",
      name: "attnViewerBundle",
      formats: ["iife"],
      fileName: () => "viewer.js",
      cssFileName: "viewer",
    },
  },
});
