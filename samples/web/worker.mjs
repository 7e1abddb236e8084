// Runs the check beside the page, so that the page stays alive: {bundle, ort} in; {say} and {verdict} out.
// The bundle is kept: a second check fetches nothing.

import { open } from './bundle.mjs';
import { check, couldNotRun } from './check.mjs';
import { listen } from './console.mjs';
import { Refusal } from './refusal.mjs';

const collect = listen();
const say = (words) => postMessage({ say: words });
let loaded = null;

onmessage = async ({ data }) => {
  try {
    say('loading onnxruntime-web');
    const ort = await runtime();
    loaded ??= await open((name, most) => get(data.bundle, name, most), { ort: data.ort, say });
    postMessage({ verdict: await check(ort, loaded, { collect, say }) });
  } catch (error) {
    postMessage({ verdict: couldNotRun(error) });
  }
};

async function runtime() {
  try {
    const ort = await import('./ort/ort.wasm.bundle.min.mjs');
    ort.env.wasm.numThreads = 1; // more need SharedArrayBuffer, and that needs headers a plain file server does not send
    return ort;
  } catch (error) {
    throw new Refusal('onnxruntime-web', {
      found: String(error?.message ?? error),
      expected: 'the folder ort/ beside this page',
      advice: 'set the page up with setup.sh',
    });
  }
}

/** A file of the bundle; what is longer than `most` bytes is cut off, for it will be refused anyway. */
async function get(folder, name, most) {
  const url = new URL(name, folder);
  let answer;
  try {
    answer = await fetch(url, { cache: 'no-cache', redirect: 'error' });
  } catch (error) {
    throw new Refusal(name, { found: `no answer for ${url}`, expected: 'a file', advice: 'is the server still there?' });
  }
  if (!answer.ok) {
    throw new Refusal(name, { found: `${answer.status} for ${url}`, expected: 'a file', advice: 'copy the whole bundle there' });
  }
  const [parts, reader] = [[], answer.body.getReader()];
  let size = 0;
  for (let part = await reader.read(); !part.done && size < most; part = await reader.read()) {
    parts.push(part.value);
    size += part.value.length;
    if (size > 1e6) say(`fetching ${name}: ${(size / 1e6).toFixed(1)} MB`);
  }
  await reader.cancel();
  const bytes = new Uint8Array(Math.min(size, most));
  let at = 0;
  for (const part of parts) {
    bytes.set(part.subarray(0, bytes.length - at), at);
    at += part.length;
  }
  return bytes;
}
