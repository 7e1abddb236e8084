// A bundle, verified: nothing is used before its name, size and SHA-256 are what the manifest says.

import * as manifests from './manifest.mjs';
import * as probes from './probe.mjs';
import { Refusal } from './refusal.mjs';

const MANIFEST_BYTES = 16 << 20;
const NOT_PORTABLE = 'com.microsoft.nchwc'; // operators with the channel block of one CPU baked in

/**
 * Read and verify what a check needs.
 *
 * get(name, most): the bytes of a file of the bundle, as Uint8Array; may stop after `most` bytes.
 * ort: take model.int8.ort in place of model.int8.onnx.
 * say: told in words what is being done.
 *
 * A web server has no listing of a folder: files that the manifest does not list cannot be seen from here, and files that
 * are listed but not needed (FP32 model, report) are not fetched. `packlight check` holds the whole folder.
 */
export async function open(get, { ort = false, say = () => {} } = {}) {
  if (!globalThis.crypto?.subtle) {
    throw new Refusal('SHA-256 cannot be computed here', {
      found: 'a page without crypto.subtle',
      expected: 'a page from https or from localhost',
      advice: 'the bundle is not verified and so not run; serve the page over https or open it on localhost',
    });
  }
  say(`reading ${manifests.MANIFEST}`);
  const manifest = manifests.read(await get(manifests.MANIFEST, MANIFEST_BYTES));
  const name = ort ? manifests.ORT : manifests.INT8;
  if (!Object.hasOwn(manifest.files, name)) {
    throw new Refusal(`${manifests.MANIFEST}:files.${name}`, {
      found: 'nothing',
      expected: 'this file',
      advice: 'export with --ort, or leave ort away to run the .onnx file',
    });
  }
  say(`verifying ${name}`);
  const model = await verified(get, manifest, name);
  if (!ort) portable(model, name); // an .ort file names every domain; wasm has no such kernels and refuses it by itself
  say(`verifying ${manifests.PROBE}`);
  const batches = probes
    .read(await verified(get, manifest, manifests.PROBE))
    .map((batch, number) => agree(batch, manifest, `${manifests.PROBE}, batch ${number}`));
  return { manifest, model, modelName: name, batches };
}

async function verified(get, manifest, name) {
  const expected = manifest.files[name];
  const bytes = await get(name, expected.size_bytes + 1);
  const advice = 'copy the bundle again';
  if (bytes.length !== expected.size_bytes) {
    const more = bytes.length > expected.size_bytes ? 'more than ' : '';
    const found = `${more}${Math.min(bytes.length, expected.size_bytes)} bytes`;
    throw new Refusal(name, { found, expected: String(expected.size_bytes), advice });
  }
  const sha256 = hex(new Uint8Array(await crypto.subtle.digest('SHA-256', bytes)));
  if (sha256 !== expected.sha256) {
    throw new Refusal(name, { found: `SHA-256 ${sha256}`, expected: expected.sha256, advice });
  }
  return bytes;
}

const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');

function portable(model, name) {
  const [first, ...rest] = new TextEncoder().encode(NOT_PORTABLE);
  for (let at = model.indexOf(first); at >= 0; at = model.indexOf(first, at + 1)) {
    if (rest.every((byte, offset) => model[at + 1 + offset] === byte)) {
      const advice = 'export again: the model was saved after ONNX Runtime had optimized it for one CPU';
      throw new Refusal(name, { found: `operators of ${NOT_PORTABLE}`, expected: 'a model for every CPU', advice });
    }
  }
}

/** The batch with its tensors in the manifest's order, or a Refusal where they are not the manifest's. */
function agree(batch, { inputs, outputs }, where) {
  const [sizes, ordered] = [new Map(), {}];
  for (const [role, listed] of [['input', inputs], ['fp32', outputs], ['int8', outputs]]) {
    const [found, expected] = [[...batch[role].keys()].sort(), listed.map(({ name }) => name).sort()];
    if (JSON.stringify(found) !== JSON.stringify(expected)) {
      throw new Refusal(`${where}, ${role}`, { found: `tensors ${found}`, expected: `${expected}`, advice: 'export again' });
    }
    ordered[role] = new Map(listed.map(({ name }) => [name, batch[role].get(name)]));
    for (const tensor of listed) fits(ordered[role].get(tensor.name), tensor, sizes, `${where}, ${role} ${tensor.name}`);
  }
  return ordered;
}

/** Hold an array against a tensor of the manifest; one named dimension has one size in all inputs of one run. */
export function fits({ dtype, shape }, tensor, sizes, where) {
  const one = (expected, size) => {
    if (typeof expected !== 'string') return expected === size;
    if (!sizes.has(expected)) sizes.set(expected, size);
    return sizes.get(expected) === size;
  };
  const same = shape.length === tensor.shape.length && shape.every((size, axis) => one(tensor.shape[axis], size));
  if (dtype !== tensor.dtype || !same) {
    throw new Refusal(where, { found: `${dtype} [${shape}]`, expected: `${tensor.dtype} [${tensor.shape}]` });
  }
}
