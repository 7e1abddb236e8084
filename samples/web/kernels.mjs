// Which kernel ran each node, in which types, how long, over how many multiply-adds: ONNX Runtime's profile -> kernels.
// The same reading as runtime/kernels.py, without NCHWc kernels, which wasm does not have.

import { Refusal } from './refusal.mjs';

const at = (position, ...kernels) => kernels.map((kernel) => [kernel, position]);
const CONV = new Map([...at(1, 'Conv', 'FusedConv', 'NhwcFusedConv', 'ConvInteger'), ...at(3, 'QLinearConv')]);
const RECURRENT = new Map(at(1, 'LSTM', 'GRU', 'RNN', 'DynamicQuantizeLSTM'));
const ATTENTION = new Map(at(1, 'Attention', 'QAttention', 'MultiHeadAttention'));
// Kernel -> position of its weight among the inputs the profiler lists.
const WEIGHT = new Map([
  ...CONV,
  ...at(1, 'MatMul', 'FusedMatMul', 'Gemm', 'FusedGemm', 'TransposeMatMul'),
  ...at(1, 'MatMulInteger', 'MatMulIntegerToFloat', 'DynamicQuantizeMatMul'),
  ...at(3, 'QLinearMatMul', 'QGemm'),
  ...RECURRENT,
  ...ATTENTION,
  ...at(1, 'ConvTranspose', 'MatMulNBits'),
]);
const INTEGER = new Set([
  'ConvInteger', 'MatMulInteger', 'MatMulIntegerToFloat', 'DynamicQuantizeMatMul', 'DynamicQuantizeLSTM', 'QGemm',
  'QAttention',
]); // and every QLinear*
const SHORT = { float: 'f32', double: 'f64', float16: 'f16', bfloat16: 'bf16', bool: 'bool' };
const MOVED = /_token_\d+$/;
const EVENT = '_kernel_time';

/**
 * Kernels of a model on one feed. open(entries) makes a profiling session with these entries beside the manifest's;
 * collect(work) gives what ONNX Runtime printed during `work`: in wasm the profile has no other way out.
 *
 * Two sessions, as a weight that was prepacked is no longer among a node's inputs: the real one tells kernels and times
 * (medians over `runs`, after one that is not counted), one without prepacking tells types and shapes.
 */
export async function trace(open, collect, feed, runs) {
  const real = await profile(open, collect, {}, feed, runs + 1);
  const shaped = await profile(open, collect, { 'session.disable_prepacking': '1' }, feed, 1);
  const nodes = group(real, ({ name, number }) => `${number} ${name}`);
  const named = group(shaped, ({ name }) => name);
  return [...nodes.values()].map((events) => {
    const last = events.slice(-Math.max(1, Math.floor(events.length / (runs + 1)))); // more than one inside a loop
    const same = (named.get(last[0].name) ?? []).filter(({ kernel }) => kernel === last[0].kernel);
    return told(events, same.length === last.length ? same : last, runs);
  });
}

/** Share, 0..1, of the multiply-adds that ran in integer kernels; 0 when there are none. */
export function integerMacs(kernels) {
  const sum = (some) => some.reduce((total, { macs }) => total + macs, 0);
  return sum(kernels.filter(({ integer }) => integer)) / (sum(kernels) || 1);
}

/** Median of numbers; the mean of the middle two when they are even in number. */
export function median(numbers) {
  const sorted = [...numbers].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

async function profile(open, collect, entries, feed, runs) {
  const session = await open(entries);
  try {
    for (let run = 0; run < runs; run += 1) await session.run(feed);
    const printed = await collect(() => session.endProfiling());
    return [...events(printed)];
  } finally {
    await session.release();
  }
}

function* events(printed) {
  let listed;
  try {
    listed = JSON.parse(printed.slice(printed.indexOf('['), printed.lastIndexOf(']') + 1));
  } catch {
    throw new Refusal("ONNX Runtime's profile", {
      found: `${printed.length} characters that are no JSON`,
      expected: 'a list of events',
      advice: 'use the version of onnxruntime-web that package.json names',
    });
  }
  for (const each of listed) {
    if (each.cat !== 'Node' || !each.name.endsWith(EVENT)) continue;
    const { args } = each;
    yield {
      name: each.name.slice(0, -EVENT.length).replace(MOVED, ''),
      number: args.node_index ?? '',
      kernel: args.op_name,
      us: each.dur,
      inputs: (args.input_type_shape ?? []).flatMap(Object.entries),
      outputs: (args.output_type_shape ?? []).flatMap(Object.entries),
    };
  }
}

function group(events, key) {
  const groups = new Map();
  for (const event of events) {
    const name = key(event);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(event);
  }
  return groups;
}

function told(events, shapes, runs) {
  const kernel = events[0].kernel;
  const each = shapes.length;
  const times = Array.from({ length: runs }, (_, run) =>
    events.slice((run + 1) * each, (run + 2) * each).reduce((sum, { us }) => sum + us, 0),
  );
  return {
    node: shapes[0].name,
    kernel,
    types: types(shapes[0]),
    ms: median(times) / 1e3,
    macs: shapes.map(macs).reduce((sum, one) => sum + one, 0),
    integer: INTEGER.has(kernel) || kernel.startsWith('QLinear'),
  };
}

function short(dtype) {
  return SHORT[dtype] ?? dtype.replace(/^uint/, 'u').replace(/^int/, 's');
}

function types({ kernel, inputs }) {
  const position = WEIGHT.get(kernel) ?? 0;
  const [first, weight] = [inputs[0], inputs[position]].map((input) => (input ? short(input[0]) : ''));
  return position === 0 || !weight || (first === 'f32' && weight === 'f32') ? first : first + weight;
}

const product = (shape) => shape.reduce((all, size) => all * size, 1);

/** Multiply-adds of one event, by the table in docs/drift.md; 0 when the shapes it needs were not seen. */
function macs({ kernel, inputs, outputs }) {
  const position = WEIGHT.get(kernel);
  if (position === undefined || position >= inputs.length || !outputs.length) return 0;
  const [x, w, y] = [inputs[0][1], inputs[position][1], outputs[0][1]];
  if (CONV.has(kernel)) return product(y) * product(w.slice(1));
  if (kernel === 'ConvTranspose') return product(x) * product(w.slice(1));
  if (kernel === 'MatMulNBits') return product(y) * x.at(-1);
  if (RECURRENT.has(kernel)) {
    const weights = inputs.slice(position, position + 2).map(([, shape]) => product(shape));
    return x[0] * x[1] * weights.reduce((sum, one) => sum + one, 0);
  }
  if (ATTENTION.has(kernel) && w.length > 2) return 2 * product(x) * w.at(-2);
  if (ATTENTION.has(kernel)) return product(x) * w.at(-1) + 2 * product(y) * x[1];
  const columns = w.length > 1 && y.length ? y.at(-1) : 1;
  return product(y) * Math.floor(product(w.slice(-2)) / (columns || 1));
}
