// The page: asks the worker for a verdict, shows it, and keeps it as data in <script id="verdict">.
// ?bundle=FOLDER is a folder of this server (default: bundle/ beside this page); ?ort takes model.int8.ort.

import { couldNotRun, Q_LIMIT, toJson } from './check.mjs';
import { judgedDb, worst as worstPart } from './drift.mjs';
import { Refusal } from './refusal.mjs';

const at = (id) => document.getElementById(id);
const asked = new URLSearchParams(location.search);
let worker = null;

function start() {
  at('again').disabled = true;
  at('verdict').textContent = '';
  status('', 'Checking', 'Starting.');
  try {
    worker ??= begin();
    worker.postMessage({ bundle: folder(), ort: asked.has('ort') });
  } catch (error) {
    show(couldNotRun(error));
  }
}

function begin() {
  const made = new Worker('./worker.mjs', { type: 'module' });
  made.onmessage = ({ data }) => (data.verdict ? show(data.verdict) : status('', 'Checking', `${sentence(data.say)}.`));
  made.onerror = (event) => {
    const found = event.message || 'a module that does not load';
    const advice = 'set the page up with setup.sh, and open it from a server and not as a file';
    show(couldNotRun(new Refusal('worker.mjs', { found, expected: 'the modules beside this page', advice })));
    worker = null;
  };
  return made;
}

function folder() {
  const url = new URL(`${asked.get('bundle') ?? 'bundle'}`.replace(/\/*$/, '/'), location.href);
  if (url.origin !== location.origin) {
    throw new Refusal('bundle', {
      found: url.origin,
      expected: `a folder of ${location.origin}`,
      advice: 'this page fetches nothing from other origins; copy the bundle beside it',
    });
  }
  return url.href;
}

function status(verdict, headline, summary) {
  at('status').dataset.verdict = verdict;
  at('headline').textContent = headline;
  at('summary').textContent = summary;
}

function show(verdict) {
  const json = toJson(verdict);
  const unmet = (verdict.lines ?? []).filter((line) => !line.met).length;
  at('found').replaceChildren(...(verdict.error ? [refused(verdict.error)] : tables(verdict)));
  if (verdict.bundle) {
    at('name').textContent = verdict.bundle.name;
    at('target').textContent = `${verdict.bundle.model}, made for ${verdict.bundle.target}; size and SHA-256 verified`;
    document.title = `${verdict.bundle.name}: ${verdict.verdict}`;
  }
  const words = verdict.error
    ? `${[verdict.error.what, verdict.error.do].filter(Boolean).join(': ')}.`
    : `${unmet ? `${unmet} of ${verdict.lines.length} limits not met` : 'Every limit holds'}; ${coverage(verdict)}; ${device(verdict)}.`;
  status(verdict.verdict, sentence(verdict.verdict), words);
  at('offline').textContent = verdict.error ? '' : 'All is loaded: runs without the server from here on.';
  at('again').disabled = false;
  at('verdict').textContent = json;
}

const sentence = (words) => words[0].toUpperCase() + words.slice(1);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const coverage = ({ integer_macs: share }) => `${percent(share)} of MACs in integer kernels`;
const decimals = (number, digits) => (Number.isFinite(number) ? number.toFixed(digits) : number > 0 ? '∞' : '−∞');
const brief = (number) => (Number.isFinite(number) ? String(Number(number.toPrecision(5))) : decimals(number));
const varying = (output) => (output.parts.length ? judgedDb(worstPart(output.parts)) : output.snr_db);
const worst = (drift) => Math.min(...drift.outputs.filter(({ by }) => by === 'reals').map((output) => Math.min(output.snr_db, varying(output))));

function device({ exact, q }) {
  if (exact) return 'int8 outputs equal those recorded at export';
  return `int8 outputs differ from those recorded at export, q ${decimals(Math.max(...Object.values(q)), 2)}`;
}

function refused({ what, found, expected, do: advice }) {
  const rows = [['What', what], ['Found', found], ['Expected', expected], ['Do', advice]].filter(([, words]) => words);
  return card('Why', element('dl', {}, ...rows.flatMap(([name, words]) => [element('dt', {}, name), element('dd', {}, words)])));
}

function tables(verdict) {
  const { drift, quantization, kernel, device: moved, lines, timing, kernels, q, notes } = verdict;
  const share = percent(verdict.integer_macs);
  const top1 = (output) => (output.same_top1 === null ? '' : percent(output.same_top1));
  const numbers = (o) =>
    o.by === 'reals'
      ? [decimals(o.snr_db, 2), decimals(varying(o), 2), o.cosine.toFixed(6), brief(o.max_abs), top1(o)]
      : ['', '', '', '', percent(o.by === 'equal' ? o.equal : o.matched)];
  const shapes = Object.entries(timing.shapes).map(([name, shape]) => `${name} [${shape.join(', ')}]`);
  return [
    card(
      'Drift',
      small(`int8 here against FP32 recorded at export, over ${drift.batches} held-out batches`),
      table(
        ['output', '#SNR dB', '#varying dB', '#cosine', '#max abs', '#same top-1', '#integer MACs'],
        drift.outputs.map((o) => [o.name, ...numbers(o), share]),
      ),
    ),
    card(
      'Device',
      small(
        `${sentence(device(verdict))}. q is the device error in units of the quantization error: at most ${Q_LIMIT} on a healthy device.`,
      ),
      table(
        ['output', '#q', 'exact'],
        moved.outputs.map((o) => [o.name, decimals(q[o.name], 3), o.equal === 1 ? 'yes' : 'no']),
      ),
      table(
        ['error', '#worst SNR dB', '#integer MACs', 'of what, against what'],
        [
          ['quantization', decimals(worst(quantization), 2), share, 'int8 recorded at export, FP32'],
          ['kernel', kernel ? decimals(worst(kernel), 2) : 'not known', share, 'int8 here, its own Q/DQ in float here'],
          ['device', decimals(worst(moved), 2), share, 'int8 here, int8 recorded at export'],
        ],
      ),
    ),
    card(
      'Limits',
      table(
        ['limit', '#found', '#limit is', 'met'],
        lines.map((line) => [
          line.what,
          brief(line.found),
          `at ${line.at} ${brief(line.limit)}`,
          line.met ? 'yes' : ['no', line.cause].filter(Boolean).join(': '),
        ]),
      ),
    ),
    card(
      'Kernels',
      element('div', { className: 'bar', role: 'img', ariaLabel: coverage(verdict) }, bar(verdict.integer_macs)),
      small(
        `${coverage(verdict)}, as ONNX Runtime's profiler saw them. One run takes ${timing.median_ms.toFixed(2)} ms ` +
          `(median of ${timing.runs}, ${timing.threads} thread, ${shapes.join(', ')}). A browser's clock goes in steps, ` +
          'often of 0.1 ms: times of small nodes are rough.',
      ),
      table(['kernel', 'runs in', '#nodes', '#ms', '#MACs'], summed(kernels), false),
      element(
        'details',
        {},
        element('summary', {}, `Every node (${kernels.length})`),
        table(
          ['node', 'kernel', '#ms', '#MACs'],
          kernels.map((k) => [k.node, `${k.kernel} ${k.types}`, ms(k.ms), macs(k.macs)]),
          false,
        ),
      ),
    ),
    card(
      'Where',
      element(
        'ul',
        {},
        ...[`onnxruntime-web ${verdict.onnxruntime}, ${verdict.machine}, wasm backend`, navigator.userAgent, ...notes].map((words) =>
          element('li', {}, words),
        ),
      ),
    ),
  ];
}

function bar(share) {
  const part = document.createElement('span');
  part.style.width = `${100 * share}%`; // through the object model: a style attribute would need a looser policy
  return part;
}

const macs = (count) => (!count ? '' : count < 1e5 ? count.toLocaleString('en') : `${(count / 1e6).toFixed(1)} M`);
const ms = (time) => (time ? time.toFixed(2) : '< 0.1'); // 0.1 ms is the step of a browser's clock

/** One row for all nodes of one kernel and one type pair, the slowest first. */
function summed(kernels) {
  const rows = new Map();
  for (const { kernel, types, ms, macs: count, integer } of kernels) {
    const row = rows.get(`${kernel} ${types}`) ?? { kernel, types, integer, nodes: 0, ms: 0, macs: 0 };
    rows.set(`${kernel} ${types}`, { ...row, nodes: row.nodes + 1, ms: row.ms + ms, macs: row.macs + count });
  }
  return [...rows.values()]
    .sort((a, b) => b.ms - a.ms)
    .map((row) => [`${row.kernel} ${row.types}`, runsIn(row), row.nodes, ms(row.ms), macs(row.macs)]);
}

function runsIn({ integer, kernel, macs: count, types }) {
  if (integer) return 'integers';
  if (/^(Quantize|Dequantize)Linear$/.test(kernel)) return 'crossing';
  return !count && /^([us]\d+|bool)$/.test(types) ? 'moves codes' : 'float';
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const small = (words) => element('p', { className: 'small' }, words);
const card = (title, ...children) => element('section', { className: 'card' }, element('h2', {}, title), ...children);

/** Words that may break where a new part of a name begins. */
const breakable = (words) =>
  String(words).split(/(?<=[a-z])(?=[A-Z])|(?<=[_/.:])/).flatMap((part, number) => (number ? [document.createElement('wbr'), part] : [part]));

/**
 * A table; a title that begins with # is that of a column of numbers. Where the screen is narrow and the table is `stacked`,
 * a row becomes a list, and each cell shows its column's title.
 */
function table(titles, rows, stacked = true) {
  const plain = titles.map((title) => title.replace('#', ''));
  const kinds = titles.map((title, column) => (title.startsWith('#') ? 'number' : column ? '' : 'name'));
  const met = (title, words) => (title === 'met' ? (words === 'yes' ? ' met' : ' unmet') : '');
  const cell = (words, column) =>
    element(
      'td',
      { className: kinds[column] + met(titles[column], words) },
      ...(stacked && column ? [element('span', { className: 'label' }, `${plain[column]} `)] : []),
      element('span', {}, ...(kinds[column] === 'number' ? [String(words)] : breakable(words))),
    );
  const head = element('tr', {}, ...plain.map((title, column) => element('th', { className: kinds[column], scope: 'col' }, title)));
  const body = rows.map((row) => element('tr', {}, ...row.map(cell)));
  return element(
    'div',
    { className: stacked ? 'stacked' : 'scroll' },
    element('table', {}, element('thead', {}, head), element('tbody', {}, ...body)),
  );
}

at('again').addEventListener('click', start);
start();
