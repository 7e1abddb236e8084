// Verified bundle + onnxruntime-web -> verdict: what runtime/gate.py does on a device, here in wasm.

import { fits } from './bundle.mjs';
import { deviceQ, judgedDb, measure, placeOf, worst } from './drift.mjs';
import { integerMacs, median, trace } from './kernels.mjs';
import { INT8, KEYS } from './manifest.mjs';
import { Refusal } from './refusal.mjs';

export const MACHINE = 'wasm32';
export const Q_LIMIT = 0.7; // healthy CPUs have at most 0.68, ones that saturate 5.4 in the median
// Of integers and sets, the share that a device has as recorded at least: a rounding that turns over flips few comparisons
export const [SAME_LIMIT, SAME_OF_SET] = [0.9, 0.5];
// Time is spent on the first batch: at most this long, and never fewer runs than three.
const TIMED_MS = 1500;
const [FEWEST, MOST] = [3, 20];
// MatMulInteger, a: uint8 [16, 16], b: int8 [16, 16], y: int32 [16, 16]: the model of runtime/cpu.py
const MATMUL_INTEGER = Uint8Array.from(
  (
    '08043a5c0a180a01610a0162120179220d4d61744d756c496e74656765721201675a130a0161120e0a0c080212080a0208100a0208105a13' +
    '0a0162120e0a0c080312080a0208100a02081062130a0179120e0a0c080612080a0208100a02081042040a00100a'
  ).match(/../g),
  (digits) => parseInt(digits, 16),
);

/**
 * Run the probe and judge it. Nothing is fetched: the bundle holds all that is needed.
 *
 * ort: the onnxruntime-web module, its wasm already told where it is.
 * collect(work): what was printed on the console during `work`; see console.mjs.
 */
export async function check(ort, bundle, { collect, say = () => {} }) {
  const { manifest, batches } = bundle;
  say('opening the model');
  const { here, timing } = await run(ort, bundle, say);
  const [fp32, recorded] = [batches.map((batch) => batch.fp32), batches.map((batch) => batch.int8)];
  const [drift, quantization, device] = [
    measure(fp32, here, manifest.judged),
    measure(fp32, recorded, manifest.judged),
    measure(recorded, here, manifest.judged),
  ];
  const q = deviceQ(device, quantization);
  say('running it once more with Q/DQ in float');
  const kernel = bundle.modelName === INT8 ? measure(await inFloat(ort, bundle), here, manifest.judged) : null;
  say('reading which kernels ran');
  const kernels = await trace(
    (entries) => open(ort, bundle, { entries, profile: true }),
    collect,
    feed(ort, manifest, batches[0]),
    Math.max(FEWEST, Math.min(10, Math.floor(TIMED_MS / (timing.median_ms || 1)))),
  );
  const integer = integerMacs(kernels);
  const lines = [
    ...exported(manifest.verdict),
    ...limits(manifest.budget, drift, integer, bundle.model.length),
    ...Object.entries(q)
      .filter(([name]) => drift.outputs.find((output) => output.name === name).by === 'reals')
      .map(([name, found]) => ceiling(`device_q ${name}`, found, Q_LIMIT)),
    ...device.outputs.flatMap((output, at) => (output.by === 'reals' ? [] : [same(output, quantization.outputs[at])])),
    ...(manifest.exact_on.includes(MACHINE)
      ? device.outputs.map(({ name, equal }) => floor(`exact ${name}`, Number(equal === 1), 1))
      : []),
  ];
  const met = lines.every((line) => line.met);
  return {
    verdict: met ? 'met' : 'not met',
    met,
    bundle: { name: manifest.name, target: manifest.target, model: bundle.modelName },
    lines,
    integer_macs: integer,
    drift,
    quantization,
    kernel,
    device,
    q,
    exact: device.outputs.every((output) => output.equal === 1),
    timing,
    kernels,
    machine: MACHINE,
    onnxruntime: ort.env.versions.web,
    notes: [...notes(manifest, ort.env.versions.web), ...(await risk(ort, manifest))],
  };
}

/** What could not be run, as a verdict. */
export function couldNotRun(error) {
  const fields = error instanceof Refusal ? error.fields : { what: String(error?.message ?? error), found: '', expected: '', do: '' };
  return { verdict: 'could not run', met: false, error: { message: error?.message ?? String(error), ...fields } };
}

/** A verdict as JSON; infinities are the strings "inf" and "-inf", as packlight writes them. */
export function toJson(verdict) {
  const plain = (key, value) => (value === Infinity ? 'inf' : value === -Infinity ? '-inf' : value);
  return JSON.stringify(verdict, plain, 1);
}

/** The int8 outputs of every batch, a Map of name -> {dtype, shape, data} each, and the time of the first batch. */
export async function run(ort, bundle, say = () => {}) {
  const { manifest, batches } = bundle;
  const session = await open(ort, bundle);
  try {
    describes(manifest, session);
    const here = [];
    for (const [number, batch] of batches.entries()) {
      say(`running batch ${number + 1} of ${batches.length}`);
      here.push(await outputs(session, manifest, feed(ort, manifest, batch)));
    }
    say('taking the time');
    const [first, times] = [feed(ort, manifest, batches[0]), []];
    for (const start = performance.now(); times.length < FEWEST || (times.length < MOST && performance.now() - start < TIMED_MS); ) {
      const before = performance.now();
      await session.run(first);
      times.push(performance.now() - before);
    }
    const shapes = Object.fromEntries(Object.entries(first).map(([name, tensor]) => [name, [...tensor.dims]]));
    return { here, timing: { median_ms: median(times), runs: times.length, threads: 1, shapes } };
  } finally {
    await session.release();
  }
}

async function inFloat(ort, bundle) {
  const session = await open(ort, bundle, { entries: { 'session.disable_quant_qdq': '1' } });
  try {
    const all = [];
    for (const batch of bundle.batches) all.push(await outputs(session, bundle.manifest, feed(ort, bundle.manifest, batch)));
    return all;
  } finally {
    await session.release();
  }
}

async function open(ort, { manifest, model, modelName }, { entries = {}, profile = false } = {}) {
  try {
    return await ort.InferenceSession.create(model, {
      executionProviders: ['wasm'],
      graphOptimizationLevel: 'all',
      logSeverityLevel: 3,
      enableProfiling: profile,
      extra: { ...manifest.session, ...entries },
    });
  } catch (error) {
    const what = `${modelName}: onnxruntime-web ${ort.env.versions.web} cannot open it`;
    const made = manifest.versions?.onnxruntime ?? 'another version';
    throw new Refusal(what, {
      found: String(error?.message ?? error).slice(0, 300),
      expected: `a model that onnxruntime ${made} wrote for this version`,
      advice: 'set the page up with a newer onnxruntime-web, or export again',
    });
  }
}

/** Refuse a model whose inputs or outputs are not the manifest's: names, dtypes, ranks. */
function describes(manifest, session) {
  for (const [role, listed] of [['input', manifest.inputs], ['output', manifest.outputs]]) {
    const actual = session[`${role}Metadata`];
    const found = actual.map(({ name, type, shape }) => `${name} ${type}[${shape?.length}]`).sort();
    const expected = listed.map(({ name, dtype, shape }) => `${name} ${dtype}[${shape.length}]`).sort();
    if (String(found) !== String(expected)) {
      const sides = { found: found.join(', '), expected: `${expected.join(', ')} (dtype, rank) of the manifest` };
      throw new Refusal(`the model's ${role}s`, { ...sides, advice: 'export again' });
    }
  }
}

function feed(ort, manifest, batch) {
  return Object.fromEntries(
    manifest.inputs.map(({ name }) => {
      const { dtype, data, shape } = batch.input.get(name);
      return [name, new ort.Tensor(dtype, data, shape)];
    }),
  );
}

async function outputs(session, manifest, tensors) {
  let made;
  try {
    made = await session.run(tensors);
  } catch (error) {
    throw new Refusal('ONNX Runtime failed while running', { found: String(error?.message ?? error).slice(0, 300) });
  }
  const sizes = new Map();
  return new Map(
    manifest.outputs.map((tensor) => {
      const { type: dtype, dims, data } = made[tensor.name];
      const array = { dtype, shape: [...dims], data };
      fits(array, tensor, sizes, `output ${tensor.name}`);
      return [tensor.name, array];
    }),
  );
}

function limits(budget, drift, integer, sizeBytes) {
  const lines = [];
  for (const name of KEYS.Budget) {
    const limit = budget[name];
    const metric = name.replace(/^min_/, '');
    const hold = name.startsWith('max_') ? ceiling : floor;
    if (limit === null || metric === 'max_ram_bytes') continue; // memory cannot be measured here; notes() says so
    if (metric === 'integer_macs') lines.push(hold(metric, integer, limit));
    else if (metric === 'max_size_bytes') lines.push(hold(metric, sizeBytes, limit));
    else {
      const found = drift.outputs.flatMap((output) => ofOutput(output, metric, limit, hold));
      if (!found.length && metric === 'same_top1') {
        const expected = 'a float output of shape [rows, classes], or one of integers';
        throw new Refusal(`budget ${name}`, { found: 'no such output', expected, advice: 'drop the limit' });
      }
      lines.push(...found);
    }
  }
  return lines;
}

/** One line: whether the export met its budget, and what it did not meet. */
function exported(verdict) {
  if (verdict === null) return [];
  const cause = verdict.lines.filter((line) => !line.met).map(said).join('; ');
  return [{ ...floor('exported', Number(verdict.met), 1), cause }];
}

/** A line in words. */
function said({ what, found, limit, cause }) {
  const side = /^(max_|device_q)/.test(what) ? 'at most' : 'at least';
  const number = found === null ? 'as measured at export' : Number.isFinite(found) ? Number(found.toPrecision(6)) : found > 0 ? 'inf' : '-inf';
  return `${what}: ${number} (${side} ${Number(limit.toPrecision(6))})${cause && `, ${cause}`}`;
}

/** Integers and sets here against those recorded: one element may always be another. */
function same(device, quantization) {
  const what = `device_same ${device.name}`;
  if (device.by === 'set') return floor(what, device.matched ?? 1, Math.min(quantization.matched ?? 0, SAME_OF_SET));
  const least = Math.min(quantization.equal, SAME_LIMIT) - 1 / Math.max(device.elements, 1);
  return floor(what, device.equal, Math.max(least, 0));
}

/** A limit on drift held against one output: real numbers; of integers the share that is equal, where top-1 is limited. */
function ofOutput(output, metric, limit, hold) {
  if (output.by === 'equal' && metric === 'same_top1') return [hold(`equal ${output.name}`, output.equal, limit)];
  if (output.by !== 'reals' || output[metric] === null) return [];
  const lines = [hold(`${metric} ${output.name}`, output[metric], limit)];
  if (metric === 'snr_db' && output.parts.length) {
    const part = worst(output.parts);
    const [where, varies] = [placeOf(part.part), part.varying_db === null ? 'is constant' : `varies by ${part.part.varying_rms.toPrecision(3)}`];
    const cause = `which ${varies} (rms) beside an error of ${part.rms.toPrecision(3)}`;
    lines.push({ ...hold(`varying_db ${output.name}${where && ` ${where}`}`, judgedDb(part), varyingLimit(limit)), cause });
  }
  return lines;
}

/** What a limit on SNR asks of what varies: an output may have a constant part, but what varies may not be lost. */
const varyingLimit = (snrDb) => Math.min(snrDb, Math.max(6, snrDb - 10));

const ceiling = (what, found, limit) => ({ what, found, limit, met: found <= limit, at: 'most' });
const floor = (what, found, limit) => ({ what, found, limit, met: found >= limit, at: 'least' });

function notes({ versions, budget }, version) {
  const said = [];
  if (versions.onnxruntime && versions.onnxruntime !== version) {
    said.push(`exported with onnxruntime ${versions.onnxruntime}, run here by onnxruntime-web ${version}`);
  }
  if (budget.max_ram_bytes !== null) {
    said.push(`max_ram_bytes ${budget.max_ram_bytes} is not held: a page cannot measure memory; packlight check does`);
  }
  return said;
}

/** A CPU that adds pairs of u8*s8 products in int16 is named, measured and not guessed: plain wasm does not, but may be built so. */
async function risk(ort, manifest) {
  if (manifest.pair_rule) return [];
  const session = await open(ort, { manifest: { session: {} }, model: MATMUL_INTEGER, modelName: 'MatMulInteger' });
  try {
    const tensor = (type, data) => new ort.Tensor(type, data, [16, 16]);
    const { y } = await session.run({ a: tensor('uint8', new Uint8Array(256).fill(255)), b: tensor('int8', new Int8Array(256).fill(127)) });
    if (y.data.every((sum) => sum === 16 * 255 * 127)) return [];
  } finally {
    await session.release();
  }
  return [
    `made for ${manifest.target}, whose weights are not held to the pair rule, and integer products here are added in int16: ` +
      'layers may saturate, without an error',
  ];
}
