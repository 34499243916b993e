/* Computes a layer that fff.adapt.to_flat wrote, on a little-endian machine with mmap; flat.py tells the format.
   cc -O2 -o flat flat.c -lm && ./flat FILE < rows > outputs     (both float32, one row after another) */
#include <fcntl.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

typedef struct { char magic[4]; uint32_t in, width, out, depth, trees, activation, glu; } Header;
static void fail(const char *what) { fprintf(stderr, "flat: %s\n", what), exit(1); }
static float affine(const float *w, const float *x, size_t n) { /* n weights, then the bias */
  float sum = w[n];
  for (size_t i = 0; i < n; i++) sum += w[i] * x[i];
  return sum;
}
static float activate(uint32_t kind, float z) {
  if (kind == 1) return 0.5f * z * (1 + erff(z * 0.70710678f)); /* gelu */
  if (kind == 2) return z / (1 + expf(-z));                     /* silu */
  if (kind == 5) return 0.5f * z * (1 + tanhf(z * (0.79788456f + 0.035677408f * z * z))); /* gelu_tanh */
  return kind == 4 ? z : z < 0 ? 0 : kind == 0 ? z : z * z;     /* identity, relu, relu2 */
}

static void compute(const Header *h, const float *nodes, size_t leaf_size, const float *x, float *y) {
  size_t inner = ((size_t)1 << h->depth) - 1, step = h->in + 1;
  const float *leaves = nodes + h->trees * inner * step;
  memset(y, 0, h->out * sizeof *y);
  for (uint32_t tree = 0; tree < h->trees; tree++, nodes += inner * step, leaves += (inner + 1) * leaf_size) {
    size_t node = 0;
    while (node < inner) node = 2 * node + 1 + (affine(nodes + node * step, x, h->in) >= 0);
    const float *w = leaves + (node - inner) * leaf_size;
    for (uint32_t o = 0; o < h->out; o++) y[o] += *w++;
    for (uint32_t unit = 0; unit < h->width; unit++, w += step + h->out) {
      float hidden = activate(h->activation, affine(w, x, h->in));
      if (h->glu) hidden *= affine(w += step, x, h->in);
      for (uint32_t o = 0; o < h->out; o++) y[o] += hidden * w[step + o];
    }
  }
}

int main(int argc, char **argv) {
  struct stat st;
  int file = argc == 2 ? open(argv[1], O_RDONLY) : -1;
  if (file < 0 || fstat(file, &st)) fail("usage: flat FILE < rows > outputs, with a FILE that can be read");
  const Header *h = st.st_size < (off_t)sizeof *h ? NULL : mmap(NULL, st.st_size, PROT_READ, MAP_SHARED, file, 0);
  if (!h || h == MAP_FAILED || memcmp(h->magic, "FFF1", 4)) fail("this is no file of fff.adapt.to_flat");
  double leaf = h->out + (double)h->width * ((h->in + 1.) * (h->glu ? 2 : 1) + h->out); /* double: no overflow */
  double floats = h->trees * ((exp2(h->depth) - 1) * (h->in + 1.) + exp2(h->depth) * leaf);
  if (sizeof *h + 4 * floats != (double)st.st_size || !h->in || h->depth > 15 || h->activation > 5)
    fail("the file is cut off or damaged");
  size_t row = h->in * sizeof(float), got;
  float *x = malloc(row), *y = malloc(h->out * sizeof *y);
  if (!x || !y) fail("out of memory");
  while ((got = fread(x, 1, row, stdin)) == row)
    compute(h, (const float *)(h + 1), (size_t)leaf, x, y), fwrite(y, sizeof *y, h->out, stdout);
  if (got) fail("the input ends within a row");
  return fflush(stdout) || ferror(stdout) ? (perror("flat"), 1) : 0;
}
