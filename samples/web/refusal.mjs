// What this page refuses: one line of what, found, expected and what to do, as runtime/errors.py draws it.

export class Refusal extends Error {
  constructor(what, { found = '', expected = '', advice = '' } = {}) {
    const sides = [found && `found ${found}`, expected && `expected ${expected}`].filter(Boolean).join(', ');
    const line = sides ? `${what}: ${sides}` : what;
    super((advice ? `${line}; ${advice}` : line).replace(/\s+/g, ' ').trim());
    this.name = 'Refusal';
    this.fields = { what, found, expected, do: advice };
  }
}
