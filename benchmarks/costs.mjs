// The clock of benchmarks/costs.py in wasm: node --no-liftoff costs.mjs ORT FOLDER < JOBS; prints JSON, one result a job.
//
// ORT: onnxruntime-web's ort.wasm.bundle.min.mjs. FOLDER: where the jobs' files are.
// JOBS: [{models: [file, ...], feed: {name: {file, dims, type}}, rounds, runs, profile, extra: {session entry: value}}, ...].
// The models of a job take turns, one thread. With `profile` each round gives every model's kernels (samples/web/kernels.mjs),
// without it the milliseconds of one run: [round][model].
// --no-liftoff: V8 would run its quick compiler's code first, ten times as slow, and replace it while the clock runs.

import fs from 'node:fs';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

import { listen } from '../samples/web/console.mjs';
import { trace } from '../samples/web/kernels.mjs';

const [, , runtime, folder] = process.argv;
const collect = listen(fs, 'writeSync', (file, text) => [text]); // how its wasm module prints in node
const ort = await import(pathToFileURL(runtime));
ort.env.wasm.numThreads = 1;

const ARRAYS = { float32: Float32Array, int64: BigInt64Array };

function read({ file, dims, type }) {
  const bytes = new Uint8Array(fs.readFileSync(join(folder, file))); // a copy: Buffers share one memory
  return new ort.Tensor(type, new ARRAYS[type](bytes.buffer), dims);
}

async function time(job) {
  const feed = Object.fromEntries(Object.entries(job.feed).map(([name, tensor]) => [name, read(tensor)]));
  const open = (model, { entries = {}, profile = false } = {}) =>
    ort.InferenceSession.create(new Uint8Array(fs.readFileSync(join(folder, model))), {
      executionProviders: ['wasm'],
      graphOptimizationLevel: 'all',
      logSeverityLevel: 3,
      enableProfiling: profile,
      extra: { ...job.extra, ...entries },
    });
  const rounds = [];
  if (job.profile) {
    for (let round = 0; round < job.rounds; round += 1) {
      const kernels = [];
      for (const model of job.models) {
        kernels.push(await trace((entries) => open(model, { entries, profile: true }), collect, feed, job.runs));
      }
      rounds.push(kernels);
    }
    return rounds;
  }
  const sessions = [];
  for (const model of job.models) sessions.push(await open(model));
  for (const session of sessions) await session.run(feed); // not counted
  for (let round = 0; round < job.rounds; round += 1) {
    const times = [];
    for (const session of sessions) {
      const before = performance.now();
      for (let run = 0; run < job.runs; run += 1) await session.run(feed);
      times.push((performance.now() - before) / job.runs);
    }
    rounds.push(times);
  }
  for (const session of sessions) await session.release();
  return rounds;
}

const results = [];
for (const job of JSON.parse(fs.readFileSync(0, 'utf8'))) results.push(await time(job));
fs.writeFileSync(1, JSON.stringify(results));
