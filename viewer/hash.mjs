import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";

/** Return the sha256 of a folder in hex: for each file, sorted by path, its posix path, a NUL, its bytes, a NUL. */
export function hashFolder(folder) {
  const hash = createHash("sha256");
  for (const path of listFiles(folder, "").sort()) {
    hash
      .update(path)
      .update("\0")
      .update(readFileSync(join(folder, path)))
      .update("\0");
  }
  return hash.digest("hex");
}

function listFiles(folder, prefix) {
  return readdirSync(join(folder, prefix), { withFileTypes: true }).flatMap((entry) => {
    const path = prefix + entry.name;
    return entry.isDirectory() ? listFiles(folder, path + "/") : [path];
  });
}
