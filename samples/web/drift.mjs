// Two streams of outputs -> drift: the formulas of docs/drift.md, added up over all batches in float64.

import { Refusal } from './refusal.mjs';

// Two orders of summation in float32 agree to more than this.
const FLOAT_NOISE_DB = 100;

/**
 * Drift of every output over all batches, with r the reference, c the candidate and e = r - c:
 *
 *   snr_db    20 log10(|r| / |e|)   inf when e = 0; -inf when r = 0 and e != 0, or where only one of r, c is finite
 *   cosine    r.c / (|r| |c|)       1 when e = 0; 0 when only one of r, c is 0
 *   max_abs   max |e|, mean_abs mean |e|, rms sqrt(mean e^2)
 *   same_top1 share of rows with argmax r = argmax c; only for float outputs [rows, columns >= 2], else null
 *
 * reference, candidate: a list of batches, each a Map of name -> {dtype, shape, data}.
 */
export function measure(reference, candidate) {
  const sums = new Map([...reference[0].keys()].map((name) => [name, new Sums()]));
  for (const [number, batch] of reference.entries()) {
    for (const [name, total] of sums) {
      const [r, c] = [batch.get(name), candidate[number].get(name)];
      if (String(r.shape) !== String(c.shape)) {
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

class Sums {
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

  add(reference, candidate) {
    const [rs, cs] = [reals(reference), reals(candidate)];
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
    }
    this.elements += rs.length;
    const [rows, columns] = reference.shape;
    this.classLike &&= reference.shape.length === 2 && columns >= 2 && reference.dtype.startsWith('float');
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
    };
  }
}

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
