// ONNX Runtime in wasm has no file system: it prints its profile. This collects what is printed.

/**
 * A collect(work) -> text of everything that `holder[name]`, a function that prints, was given while `work` ran.
 *
 * holder, name: in a browser console and "log". words: the printed words among the function's arguments.
 * Call it before onnxruntime-web makes its first session: its wasm module keeps the console.log that it finds then.
 * Outside of collect() everything is passed on.
 */
export function listen(holder = console, name = 'log', words = (...given) => given) {
  const passOn = holder[name].bind(holder);
  let heard = null;
  holder[name] = (...given) => (heard ? heard.push(words(...given).join(' ')) : passOn(...given));
  return async (work) => {
    heard = [];
    try {
      await work();
      return heard.join('\n');
    } finally {
      heard = null;
    }
  };
}
