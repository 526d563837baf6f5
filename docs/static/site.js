// Widgets speak to MathJax 2; a page with formulas has MathJax 3
addEventListener('DOMContentLoaded', () => {
  if (window.MathJax) MathJax.Hub = {Queue: ([,, element]) => MathJax.startup.promise.then(() => MathJax.typesetPromise([element]))}
})
