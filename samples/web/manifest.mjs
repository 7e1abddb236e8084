// manifest.json, read as docs/format.md says: strict JSON, exactly these keys, or a Refusal that names the place.

import { Refusal } from './refusal.mjs';

export const FORMAT = 2;
export const MANIFEST = 'manifest.json';
export const INT8 = 'model.int8.onnx';
export const ORT = 'model.int8.ort';
export const PROBE = 'probe.npz';
export const DTYPES = [
  'bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64', 'float16', 'float32', 'float64',
];

// The keys of runtime/manifest.py's values; a test holds them together.
export const KEYS = {
  Manifest: [
    'format', 'name', 'target', 'inputs', 'outputs', 'files', 'pair_rule', 'exact_on', 'recorded_on', 'session', 'budget',
    'judged', 'preprocessing', 'verdict', 'versions',
  ],
  Preprocessing: [
    'input', 'channels', 'resize', 'interpolation', 'crop', 'scale', 'mean', 'std', 'layout', 'dtype',
  ],
  Tensor: ['name', 'dtype', 'shape'],
  File: ['sha256', 'size_bytes'],
  Machine: ['machine', 'flags'],
  Judged: ['by', 'axis', 'batched', 'parts'],
  Part: ['axis', 'runs', 'varying_rms'],
  Exported: ['met', 'lines', 'batches', 'outputs', 'probe', 'hardest'],
  Line: ['what', 'found', 'limit', 'met', 'cause'],
  Measured: ['snr_db', 'varying_db', 'cosine', 'max_abs', 'same_top1', 'equal', 'matched', 'elements'],
  Budget: [
    'min_snr_db', 'min_cosine', 'max_abs', 'min_same_top1', 'min_integer_macs', 'max_size_bytes', 'max_ram_bytes',
  ],
};
const SHARES = ['min_same_top1', 'min_integer_macs'];

// The session entries that a bundle may set: they change how a model computes, and neither read nor write files.
export const ENTRIES = ['optimization.disable_specified_optimizers', ...[
  'qdqisint8allowed', 'x64quantprecision', 'disable_quant_qdq', 'disable_double_qdq_remover', 'enable_quant_qdq_cleanup',
  'disable_qdq_constant_folding', 'enable_dq_matmulnbits_fusion', 'qdq_matmulnbits_accuracy_level',
  'qdq_matmulnbits_block_size', 'graph_optimizations_loop_level', 'disable_prepacking', 'set_denormal_as_zero',
  'use_deterministic_compute', 'dynamic_block_base', 'intra_op.allow_spinning', 'intra_op.spin_duration_us',
  'intra_op.spin_backoff_max',
].map((name) => `session.${name}`)];

const PLAIN_NAME = /^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}$/;
const HEX = /^[0-9a-f]{64}$/;

/** The manifest in `bytes`, or a Refusal. */
export function read(bytes) {
  const root = parse(bytes);
  if (Number.isInteger(root?.format) && root.format > FORMAT) {
    refuse('format', root.format, `${FORMAT} or less`, 'made by a newer packlight; set this page up again from it');
  }
  if (root?.format === 1) root.verdict ??= null; // it says nothing of the export's verdict
  table(root, '', 'Manifest');
  if (![1, FORMAT].includes(root.format)) refuse('format', root.format, `1 or ${FORMAT}`);
  for (const key of ['name', 'target']) text(root[key], key);
  for (const key of ['inputs', 'outputs']) tensors(root[key], key);
  files(root.files);
  if (typeof root.pair_rule !== 'boolean') refuse('pair_rule', root.pair_rule, 'true or false');
  texts(root.exact_on, 'exact_on');
  table(root.recorded_on, 'recorded_on', 'Machine');
  text(root.recorded_on.machine, 'recorded_on.machine');
  texts(root.recorded_on.flags, 'recorded_on.flags');
  for (const key of Object.keys(mapping(root.session, 'session', text))) {
    if (!ENTRIES.includes(key)) {
      refuse(`session.${key}`, 'an entry no bundle may set', 'one of those in docs/format.md');
    }
  }
  budget(root.budget);
  mapping(root.judged, 'judged', judged);
  for (const name of Object.keys(root.judged)) {
    if (!root.outputs.some((output) => output.name === name)) refuse(`judged.${name}`, 'no output', 'the name of an output');
  }
  if (root.preprocessing !== null) table(root.preprocessing, 'preprocessing', 'Preprocessing');
  verdict(root.verdict);
  mapping(root.versions, 'versions', text);
  return root;
}

/** What the export judged: a bundle that failed there fails here. */
function verdict(value) {
  if (value === null) return;
  table(value, 'verdict', 'Exported');
  const isCount = (each) => Number.isSafeInteger(each) && each >= 0;
  if (!Array.isArray(value.lines)) refuse('verdict.lines', value.lines, 'a list');
  value.lines.forEach((line, number) => {
    const at = `verdict.lines[${number}]`;
    table(line, at, 'Line');
    for (const key of ['what', 'cause']) if (typeof line[key] !== 'string') refuse(`${at}.${key}`, line[key], 'a text');
    if (typeof line.met !== 'boolean') refuse(`${at}.met`, line.met, 'true or false');
    line.found = real(line.found, `${at}.found`);
    line.limit = real(line.limit, `${at}.limit`) ?? refuse(`${at}.limit`, null, 'a number');
  });
  if (value.met !== value.lines.every((line) => line.met)) {
    refuse('verdict.met', value.met, 'true where every line is met, else false');
  }
  if (!isCount(value.batches)) refuse('verdict.batches', value.batches, 'an integer >= 0');
  for (const [name, seen] of Object.entries(mapping(value.outputs, 'verdict.outputs', () => {}))) {
    table(seen, `verdict.outputs.${name}`, 'Measured');
    for (const key of KEYS.Measured) real(seen[key], `verdict.outputs.${name}.${key}`);
  }
  if (!Array.isArray(value.probe) || !value.probe.every(isCount)) refuse('verdict.probe', value.probe, 'numbers of batches');
  if (value.hardest !== null && !isCount(value.hardest)) refuse('verdict.hardest', value.hardest, 'the number of a batch or null');
}

/** A number as canonical JSON has it; infinity is a text there. */
function real(value, place) {
  if (value === 'inf' || value === '-inf') return value === 'inf' ? Infinity : -Infinity;
  if (value !== null && !Number.isFinite(value)) refuse(place, value, 'a number, "inf", "-inf" or null');
  return value;
}

function judged(value, place) {
  table(value, place, 'Judged');
  if (!['reals', 'equal', 'set'].includes(value.by)) refuse(`${place}.by`, value.by, 'one of reals, equal, set');
  axis(value.axis, `${place}.axis`);
  if (typeof value.batched !== 'boolean') refuse(`${place}.batched`, value.batched, 'true or false');
  if (!Array.isArray(value.parts)) refuse(`${place}.parts`, value.parts, 'a list');
  value.parts.forEach((part, number) => {
    const at = `${place}.parts[${number}]`;
    table(part, at, 'Part');
    if (part.axis !== null) axis(part.axis, `${at}.axis`);
    if (!Array.isArray(part.runs) || (part.runs.length > 0) === (part.axis === null)) {
      refuse(`${at}.runs`, part.runs, 'a list, empty where axis is null and only there');
    }
    for (const run of part.runs) {
      const fits = Array.isArray(run) && run.length === 2 && run.every(Number.isInteger) && run[0] >= 0 && run[0] < run[1];
      if (!fits) refuse(`${at}.runs`, run, '[start, stop] with 0 <= start < stop');
    }
    if (part.varying_rms !== null && !(Number.isFinite(part.varying_rms) && part.varying_rms >= 0)) {
      refuse(`${at}.varying_rms`, part.varying_rms, 'a number >= 0 or null');
    }
  });
}

function axis(value, place) {
  if (!Number.isInteger(value) || value < 0 || value >= 64) refuse(place, value, 'an axis, 0..63');
}

function parse(bytes) {
  let words, root;
  try {
    words = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
    root = JSON.parse(words);
  } catch (error) {
    throw new Refusal(`${MANIFEST}: not strict JSON`, {
      found: error.message.slice(0, 120),
      advice: 'is this the folder that packlight export wrote? Else export again',
    });
  }
  // JSON.parse keeps the last of two equal keys and says nothing: there are then more keys in the text than in the value.
  const written = words.match(/"(?:[^"\\]|\\.)*"\s*:?/g)?.filter((token) => token.endsWith(':')).length ?? 0;
  if (written !== keys(root)) refuse('', 'a key that appears twice in one object', 'each key once');
  return root;
}

function keys(value) {
  if (value === null || typeof value !== 'object') return 0;
  const inside = Object.values(value).reduce((sum, each) => sum + keys(each), 0);
  return inside + (Array.isArray(value) ? 0 : Object.keys(value).length);
}

function refuse(place, found, expected, advice = '') {
  const said = typeof found === 'string' ? found : JSON.stringify(found) ?? 'nothing';
  throw new Refusal(place ? `${MANIFEST}:${place}` : MANIFEST, {
    found: said.slice(0, 120) || 'an empty string',
    expected: String(expected),
    advice,
  });
}

const isObject = (value) => value !== null && typeof value === 'object' && !Array.isArray(value);

function table(value, place, kind) {
  if (!isObject(value)) refuse(place, value, 'an object');
  const at = (key) => (place ? `${place}.${key}` : key);
  for (const key of Object.keys(value)) {
    if (!KEYS[kind].includes(key)) refuse(at(key), 'an unknown key', `one of ${KEYS[kind].join(', ')}`);
  }
  for (const key of KEYS[kind]) {
    if (!Object.hasOwn(value, key)) refuse(at(key), 'nothing', 'this key', 'export again with this packlight');
  }
}

function mapping(value, place, check) {
  if (!isObject(value)) refuse(place, value, 'an object');
  for (const [key, each] of Object.entries(value)) check(each, `${place}.${key}`);
  return value;
}

function text(value, place) {
  if (typeof value !== 'string' || !value) refuse(place, value, 'a string that is not empty');
}

function texts(value, place) {
  if (!Array.isArray(value)) refuse(place, value, 'a list');
  value.forEach((each, number) => text(each, `${place}[${number}]`));
}

function tensors(value, place) {
  if (!Array.isArray(value) || !value.length) refuse(place, value, 'a list that is not empty');
  value.forEach((tensor, number) => {
    const at = `${place}[${number}]`;
    table(tensor, at, 'Tensor');
    text(tensor.name, `${at}.name`);
    if (!DTYPES.includes(tensor.dtype)) refuse(`${at}.dtype`, tensor.dtype, `one of ${DTYPES.join(', ')}`);
    if (!Array.isArray(tensor.shape)) refuse(`${at}.shape`, tensor.shape, 'a list');
    tensor.shape.forEach((size, axis) => {
      const fits = isSize(size) || (typeof size === 'string' && size);
      if (!fits) refuse(`${at}.shape[${axis}]`, size, "a size >= 0 or a dimension's name");
    });
  });
  if (new Set(value.map(({ name }) => name)).size !== value.length) {
    refuse(place, 'two tensors of one name', 'each name once');
  }
}

const isSize = (value) => Number.isSafeInteger(value) && value >= 0;

function files(value) {
  mapping(value, 'files', (file, place) => {
    table(file, place, 'File');
    if (typeof file.sha256 !== 'string' || !HEX.test(file.sha256)) {
      refuse(`${place}.sha256`, file.sha256, '64 lower-case hexadecimal digits');
    }
    if (!isSize(file.size_bytes)) refuse(`${place}.size_bytes`, file.size_bytes, 'an integer >= 0');
  });
  for (const name of Object.keys(value)) {
    if (!PLAIN_NAME.test(name) || name === MANIFEST || name.includes('..')) {
      refuse(`files.${name}`, 'a name that is not allowed', "a plain file name in the bundle's own folder");
    }
  }
  for (const name of [INT8, PROBE]) {
    if (!Object.hasOwn(value, name)) refuse(`files.${name}`, 'nothing', 'this file');
  }
}

function budget(value) {
  table(value, 'budget', 'Budget');
  for (const [name, limit] of Object.entries(value)) {
    if (limit === null) continue;
    if (typeof limit !== 'number' || !Number.isFinite(limit)) {
      refuse(`budget.${name}`, limit, 'a finite number or null');
    }
    if (name.endsWith('_bytes') && !(Number.isInteger(limit) && limit >= 1)) refuse(`budget.${name}`, limit, 'a whole number >= 1');
    if (SHARES.includes(name) && !(limit >= 0 && limit <= 1)) refuse(`budget.${name}`, limit, 'a share in 0..1');
  }
}
