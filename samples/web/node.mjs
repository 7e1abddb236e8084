// The page's check in node: node node.mjs [BUNDLE] [--ort] [--outputs FILE]; prints the verdict as JSON.
// Run it from the folder that setup.sh made. Exit status: 0 met, 1 not met, 2 could not run.

import { webcrypto } from 'node:crypto';
import fs from 'node:fs';
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import { open } from './bundle.mjs';
import { check, couldNotRun, run, toJson } from './check.mjs';
import { listen } from './console.mjs';
import { Refusal } from './refusal.mjs';

globalThis.crypto ??= webcrypto; // node 18

const words = process.argv.slice(2);
const at = words.indexOf('--outputs');
const [, outputsFile] = at < 0 ? [] : words.splice(at, 2);
const [folder = fileURLToPath(new URL('./bundle', import.meta.url))] = words.filter((word) => word !== '--ort');

const get = async (name) => {
  try {
    return new Uint8Array(await readFile(join(folder, name)));
  } catch (error) {
    throw new Refusal(name, { found: error.code, expected: `a file of ${folder}`, advice: 'copy the whole bundle' });
  }
};

try {
  const collect = listen(fs, 'writeSync', (file, text) => [text]); // how its wasm module prints in node
  const ort = await import('./ort/ort.wasm.bundle.min.mjs');
  ort.env.wasm.numThreads = 1;
  const bundle = await open(get, { ort: words.includes('--ort') });
  const verdict = await check(ort, bundle, { collect });
  if (outputsFile) await writeFile(outputsFile, JSON.stringify((await run(ort, bundle)).here.map(Object.fromEntries), plain));
  process.stdout.write(`${toJson(verdict)}\n`);
  process.exitCode = verdict.met ? 0 : 1;
} catch (error) {
  process.stdout.write(`${toJson(couldNotRun(error))}\n`);
  process.exitCode = 2;
}

/** Arrays as hexadecimal bytes: every bit of an output, NaN included. */
function plain(key, value) {
  return ArrayBuffer.isView(value) ? Buffer.from(value.buffer, value.byteOffset, value.byteLength).toString('hex') : value;
}
