// probe.npz: a zip of stored .npy members -> [{input, fp32, int8}], each {name: {dtype, shape, data}}.
// docs/format.md says what a reader must refuse; whatever numpy would not have written so is refused too.

import { PROBE } from './manifest.mjs';
import { Refusal } from './refusal.mjs';

const ROLES = ['input', 'fp32', 'int8'];
const KEY = /^(\d{4,})\/(input|fp32|int8)\/([^]+)\.npy$/;

// numpy's descr -> our dtype and what holds its bytes. float16 stays as bits where the browser has no Float16Array.
const HALVES = globalThis.Float16Array ?? Uint16Array;
const DESCR = {
  '|b1': ['bool', Uint8Array],
  '|i1': ['int8', Int8Array],
  '|u1': ['uint8', Uint8Array],
  '<i2': ['int16', Int16Array],
  '<u2': ['uint16', Uint16Array],
  '<i4': ['int32', Int32Array],
  '<u4': ['uint32', Uint32Array],
  '<i8': ['int64', BigInt64Array],
  '<u8': ['uint64', BigUint64Array],
  '<f2': ['float16', HALVES],
  '<f4': ['float32', Float32Array],
  '<f8': ['float64', Float64Array],
};

/** The batches in `bytes`, in order. */
export function read(bytes) {
  const batches = new Map();
  for (const [path, member] of members(bytes)) {
    const [, number, role, name] = KEY.exec(path) ?? refuse(path, 'an unknown key', `NNNN/ROLE/NAME of ${ROLES}`);
    const at = Number(number);
    if (!batches.has(at)) batches.set(at, Object.fromEntries(ROLES.map((each) => [each, new Map()])));
    batches.get(at)[role].set(name, array(member, path));
  }
  const numbers = [...batches.keys()].sort((a, b) => a - b);
  if (!numbers.length || numbers.some((number, at) => number !== at)) {
    refuse('', `batches ${numbers.slice(0, 8)}`, '0000, 0001, ... without a gap');
  }
  return numbers.map((number) => batches.get(number));
}

function refuse(place, found, expected) {
  throw new Refusal(place ? `${PROBE}:${place}` : PROBE, { found, expected, advice: 'export the bundle again' });
}

// The zip: names and sizes come from its directory at the end, and each member's own header must agree.
const END = 0x06054b50;
const ENTRY = 0x02014b50;
const LOCAL = 0x04034b50;
const STORED = 0;
const PLAIN_FLAGS = 0x0800; // names in UTF-8; no other flag: not encrypted, sizes where they belong

function* members(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const end = bytes.length - 22; // a zip of ours has no comment, and so ends with its end record
  if (end < 0 || view.getUint32(end, true) !== END) refuse('', 'no end of a zip', 'an .npz file, as numpy writes it');
  const count = view.getUint16(end + 10, true);
  let at = view.getUint32(end + 16, true);
  if (count === 0xffff || at === 0xffffffff) refuse('', 'more than 65534 arrays or 4 GiB', 'a smaller probe');
  const seen = new Set();
  for (let number = 0; number < count; number += 1) {
    if (at + 46 > end || view.getUint32(at, true) !== ENTRY) refuse('', 'a damaged directory', 'a whole .npz file');
    const entry = {
      flags: view.getUint16(at + 8, true),
      method: view.getUint16(at + 10, true),
      crc: view.getUint32(at + 16, true),
      packed: view.getUint32(at + 20, true),
      size: view.getUint32(at + 24, true),
      start: view.getUint32(at + 42, true),
    };
    const nameBytes = view.getUint16(at + 28, true);
    const name = utf8(bytes.subarray(at + 46, at + 46 + nameBytes));
    at += 46 + nameBytes + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
    if (seen.has(name)) refuse(name, 'an array that is there twice', 'each once');
    seen.add(name);
    yield [name, content(bytes, view, entry, name, end)];
  }
  if (at !== end) refuse('', 'bytes that no array owns', 'a directory that ends the file');
}

function content(bytes, view, { flags, method, crc, packed, size, start }, name, end) {
  if (method !== STORED || packed !== size) refuse(name, 'compressed arrays', 'stored ones');
  if (flags & ~PLAIN_FLAGS) refuse(name, `zip flags ${flags}`, 'none but that names are UTF-8');
  if (size === 0xffffffff || start + 30 > end || view.getUint32(start, true) !== LOCAL) {
    refuse(name, 'no such member', 'one inside the file');
  }
  const nameBytes = view.getUint16(start + 26, true);
  const from = start + 30 + nameBytes + view.getUint16(start + 28, true);
  if (utf8(bytes.subarray(start + 30, start + 30 + nameBytes)) !== name || from + size > end) {
    refuse(name, 'two headers that disagree', 'one name and a size inside the file');
  }
  const member = bytes.slice(from, from + size); // a copy: typed arrays need their bytes aligned
  if (crc32(member) !== crc) refuse(name, 'another CRC-32', 'the one in the directory');
  return member;
}

const utf8 = (bytes) => {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch {
    return refuse('', 'a name that is not UTF-8', 'an .npz file, as numpy writes it');
  }
};

const CRC = Uint32Array.from({ length: 256 }, (_, byte) => {
  let bits = byte;
  for (let bit = 0; bit < 8; bit += 1) bits = bits & 1 ? 0xedb88320 ^ (bits >>> 1) : bits >>> 1;
  return bits;
});

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = CRC[(crc ^ byte) & 0xff] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

// .npy: magic, version, length of the header, the header as a Python literal, the elements.
const MAGIC = '\x93NUMPY';
const HEADER = /^\{'descr': '([^']*)', 'fortran_order': (False|True), 'shape': \(([\d, ]*)\), \} *\n$/;

function array(bytes, place) {
  const latin = (from, to) => String.fromCharCode(...bytes.subarray(from, to));
  const wide = bytes[6] > 1; // versions 2 and 3 have a header length of four bytes
  if (latin(0, 6) !== MAGIC || !(bytes[6] >= 1 && bytes[6] <= 3) || bytes.length < 12) {
    refuse(place, 'another format', 'an .npy array');
  }
  const view = new DataView(bytes.buffer);
  const length = wide ? view.getUint32(8, true) : view.getUint16(8, true);
  const from = (wide ? 12 : 10) + length;
  if (length > 1 << 14 || from > bytes.length) refuse(place, `a header of ${length} bytes`, 'one inside the array');
  const [, descr, fortran, sizes] = HEADER.exec(latin(wide ? 12 : 10, from)) ?? refuse(place, 'another header', "numpy's");
  if (!Object.hasOwn(DESCR, descr)) refuse(place, `descr ${descr}`, `one of ${Object.keys(DESCR)}; no Python objects`);
  if (fortran === 'True') refuse(place, 'Fortran order', 'C order');
  const shape = sizes.split(',').map((size) => size.trim()).filter(Boolean).map(Number);
  const [dtype, Holder] = DESCR[descr];
  const elements = shape.reduce((product, size) => product * size, 1);
  if (elements * Holder.BYTES_PER_ELEMENT !== bytes.length - from) {
    refuse(place, `${bytes.length - from} bytes of elements`, `${elements * Holder.BYTES_PER_ELEMENT} for [${shape}]`);
  }
  return { dtype, shape, data: new Holder(bytes.slice(from).buffer) };
}
