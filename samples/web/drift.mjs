// Two streams of outputs -> drift: the formulas of docs/drift.md, added up over all batches in float64.

import { Refusal } from './refusal.mjs';

// Two orders of summation in float32 agree to more than this.
const FLOAT_NOISE_DB = 100;
// What varies by less than this share of an output's rms does not vary.
const NOTHING_VARIES = 2 ** -20;
// Items of a set are partners where each number differs by no more than this share of the largest one beside it.
const NEAR = 0.05;
const MOST_ITEMS = 512;

/**
 * Drift of every output over all batches, with r the reference, c the candidate and e = r - c:
 *
 *   snr_db    20 log10(|r| / |e|)   inf when e = 0; -inf when r = 0 and e != 0, or where only one of r, c is finite
 *   cosine    r.c / (|r| |c|)       1 when e = 0; 0 when only one of r, c is 0
 *   max_abs   max |e|, mean_abs mean |e|, rms sqrt(mean e^2)
 *   same_top1 share of rows with argmax r = argmax c; only for float outputs [rows, columns >= 2], else null
 *
 *   equal     share of elements with r = c
 *   matched   of a set, the share of r's items that have a partner in c; else null
 *   parts     snr_db, and varying_db of what varies in them, as the manifest recorded it
 *
 * reference, candidate: a list of batches, each a Map of name -> {dtype, shape, data}. judged: the manifest's.
 */
export function measure(reference, candidate, judged = {}) {
  const sums = new Map([...reference[0].keys()].map((name) => [name, new Sums(judged[name])]));
  for (const [number, batch] of reference.entries()) {
    for (const [name, total] of sums) {
      const [r, c] = [batch.get(name), candidate[number].get(name)];
      if (r.shape.length !== c.shape.length) {
        const where = `batch ${number}, output ${name}`;
        throw new Refusal(where, { found: `shape [${c.shape}]`, expected: `[${r.shape}] of the reference` });
      }
      total.add(r, c);
    }
  }
  return { outputs: [...sums].map(([name, total]) => total.result(name)), batches: reference.length };
}

/**
 * {output: rms(here - recorded) / rms(recorded - fp32)}: the device error in units of the quantization error.
 * An error below FLOAT_NOISE_DB is none, a quantization error below it counts as that much; inf where not finite.
 */
export function deviceQ(device, quantization) {
  const ratio = (d, q) => {
    if (d.snr_db >= FLOAT_NOISE_DB) return 0;
    const noise = d.rms * 10 ** ((d.snr_db - FLOAT_NOISE_DB) / 20);
    const unit = Math.max(q.rms, Number.isFinite(noise) ? noise : 0);
    return unit > 0 && unit < Infinity && Number.isFinite(d.rms) ? d.rms / unit : Infinity;
  };
  return Object.fromEntries(device.outputs.map((d, at) => [d.name, ratio(d, quantization.outputs[at])]));
}

/** SNR of what varies in a part, where something does; else of its numbers. */
export const judgedDb = (part) => part.varying_db ?? part.snr_db;

/** The part with the smallest SNR. */
export const worst = (parts) => parts.reduce((least, part) => (judgedDb(part) < judgedDb(least) ? part : least));

/** "channels 4..8": which elements; empty for all. */
export function placeOf({ axis, runs }) {
  if (axis === null) return '';
  const said = runs.slice(0, 3).map(([start, stop]) => (stop === start + 1 ? `${start}` : `${start}..${stop - 1}`)).join(', ');
  return `${axis === 1 ? 'channels' : `axis ${axis}`} ${said}${runs.length > 3 ? ', ...' : ''}`;
}

class Sums {
  same = 0;
  elsewhere = 0;
  items = 0;
  partners = 0;
  rr = 0;
  cc = 0;
  rc = 0;
  ee = 0;
  absSum = 0;
  absMax = 0;
  elements = 0;
  rows = 0;
  sameRows = 0;
  classLike = true;

  constructor(judged) {
    this.judged = judged;
    this.by = judged?.by ?? '';
    this.parts = (judged?.parts ?? []).map((part) => ({ part, rr: 0, ee: 0, elements: 0 }));
  }

  add(reference, candidate) {
    if (String(reference.shape) !== String(candidate.shape)) this.by = 'set'; // from the first sizes that differ on
    this.by ||= reference.dtype.startsWith('float') ? 'reals' : 'equal';
    const [rs, cs] = [reals(reference), reals(candidate)];
    if (this.by === 'set') {
      const how = this.judged ?? { axis: 0, batched: false };
      const [found, looked] = partners(items(rs, reference.shape, how), items(cs, candidate.shape, how), reference.dtype);
      this.partners += found;
      this.items += looked;
    }
    if (String(reference.shape) !== String(candidate.shape)) {
      this.elsewhere += Math.max(rs.length, cs.length);
      return;
    }
    const inside = this.by === 'reals' ? this.parts.filter(({ part }) => reaches(part, reference.shape)) : [];
    const members = inside.map(({ part }) => membership(part, reference.shape));
    for (let at = 0; at < rs.length; at += 1) {
      let [r, c] = [Number(rs[at]), Number(cs[at])];
      if (!(Number.isFinite(r) && Number.isFinite(c))) {
        c = Object.is(r, c) ? 0 : Infinity; // the same infinity, or NaN, in both counts as 0
        r = 0;
      }
      const e = Math.abs(r - c);
      this.rr += r * r;
      this.cc += c * c;
      this.rc += r && c ? r * c : 0;
      this.ee += e * e;
      this.absSum += e;
      if (e > this.absMax) this.absMax = e;
      if (e === 0) this.same += 1;
      for (let each = 0; each < inside.length; each += 1) {
        if (!members[each](at)) continue;
        inside[each].rr += r * r;
        inside[each].ee += e * e;
        inside[each].elements += 1;
      }
    }
    this.elements += rs.length;
    const [rows, columns] = reference.shape;
    this.classLike &&= this.by === 'reals' && reference.shape.length === 2 && columns >= 2 && reference.dtype.startsWith('float');
    if (!this.classLike) return;
    this.rows += rows;
    for (let row = 0; row < rows; row += 1) {
      if (argmax(rs, row * columns, columns) === argmax(cs, row * columns, columns)) this.sameRows += 1;
    }
  }

  result(name) {
    return {
      name,
      snr_db: snrDb(this.rr, this.ee),
      cosine: this.ee === 0 ? 1 : cosine(this.rr, this.cc, this.rc),
      max_abs: this.absMax,
      mean_abs: this.elements ? this.absSum / this.elements : 0,
      rms: this.elements ? Math.sqrt(this.ee / this.elements) : 0,
      same_top1: this.classLike && this.rows ? this.sameRows / this.rows : null,
      elements: this.elements,
      by: this.by || 'reals',
      axis: this.judged?.axis ?? 0,
      batched: this.judged?.batched ?? false,
      equal: this.elements + this.elsewhere ? this.same / (this.elements + this.elsewhere) : 1,
      matched: this.by === 'set' ? (this.items ? this.partners / this.items : 1) : null,
      parts: this.parts.filter((each) => each.elements).map(partResult),
    };
  }
}

function partResult({ part, rr, ee, elements }) {
  const known = part.varying_rms !== null;
  let vv = known ? part.varying_rms ** 2 * elements : 0;
  if (vv <= NOTHING_VARIES ** 2 * rr) vv = 0;
  const varying = known ? Math.sqrt(vv / elements) : null;
  return {
    part: { ...part, varying_rms: varying },
    snr_db: snrDb(rr, ee),
    varying_db: varying ? snrDb(vv, ee) : null,
    rms: Math.sqrt(ee / elements),
    elements,
  };
}

const reaches = ({ axis, runs }, shape) => axis === null || (axis < shape.length && runs.at(-1)[1] <= shape[axis]);

/** Whether the element at a place in C order is one of a part's. */
function membership({ axis, runs }, shape) {
  if (axis === null) return () => true;
  const step = shape.slice(axis + 1).reduce((product, size) => product * size, 1);
  const chosen = new Uint8Array(shape[axis]);
  for (const [start, stop] of runs) chosen.fill(1, start, stop);
  return (at) => chosen[Math.floor(at / step) % shape[axis]] === 1;
}

/** The items along an axis, and along the first one where it is another and is batched: a list of rows. */
function items(data, shape, { axis: asked, batched }) {
  if (!shape.length) return [[data[0]]];
  const axis = Math.min(asked, shape.length - 1);
  const step = shape.slice(axis + 1).reduce((product, size) => product * size, 1);
  const inFirst = data.length / (shape[0] || 1);
  const rows = new Map();
  for (let at = 0; at < data.length; at += 1) {
    const item = Math.floor(at / step) % shape[axis];
    const key = axis && batched ? Math.floor(at / inFirst) * shape[axis] + item : item;
    if (!rows.has(key)) rows.set(key, []);
    rows.get(key).push(data[at]);
  }
  return [...rows.keys()].sort((a, b) => a - b).map((key) => rows.get(key));
}

/** [items of the reference that have a partner, items that were looked at]. */
function partners(reference, candidate, dtype) {
  if (!reference.length || !candidate.length || reference[0].length !== candidate[0].length) return [0, reference.length];
  if (!dtype.startsWith('float')) {
    const there = new Set(candidate.map(String));
    return [reference.filter((row) => there.has(String(row))).length, reference.length];
  }
  const near = reference[0].map((_, at) => NEAR * reference.reduce((most, row) => Math.max(most, finite(row[at])), 0));
  const looked = reference.filter((_, at) => at % Math.max(1, Math.ceil(reference.length / MOST_ITEMS)) === 0);
  const has = (row) => candidate.some((other) => row.every((value, at) => Math.abs(other[at] - value) <= near[at]));
  return [looked.filter(has).length, looked.length];
}

const finite = (value) => (Number.isFinite(value) ? Math.abs(value) : 0);

function snrDb(rr, ee) {
  if (ee === 0) return Infinity;
  if (rr === 0 || ee === Infinity) return -Infinity;
  return 10 * (Math.log10(rr) - Math.log10(ee));
}

function cosine(rr, cc, rc) {
  if (rr === 0 || cc === 0 || !Number.isFinite(rr + cc)) return 0;
  return Math.max(-1, Math.min(1, rc / (Math.sqrt(rr) * Math.sqrt(cc))));
}

/** The first largest of a row; NaN is largest of all, as in numpy. */
function argmax(values, from, columns) {
  let best = 0;
  for (let column = 0; column < columns; column += 1) {
    if (Number.isNaN(values[from + column])) return column;
    if (values[from + column] > values[from + best]) best = column;
  }
  return best;
}

/** An array's elements as numbers; float16 is decoded where the browser keeps it as bits. */
function reals({ dtype, data }) {
  return dtype === 'float16' && data instanceof Uint16Array ? Float32Array.from(data, half) : data;
}

function half(bits) {
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : fraction * 2 ** -24);
}
