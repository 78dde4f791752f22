// RMSNorm in Hugging Face's order: normed rounded to bf16, then times the weight. norm INPUT OUTPUT, both safetensors.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char *header, *data;
static uint64_t size;

static char *entry(const char *name) { // what the header says of a tensor; ends where it has none
    char key[40];
    snprintf(key, sizeof key, "\"%s\":{", name);
    char *at = strstr(header, key);
    if (!at) { fprintf(stderr, "no tensor %s\n", name); exit(2); }
    return at;
}
static void *values(const char *name) { return data + strtoull(strstr(entry(name), "\"data_offsets\":[") + 16, 0, 10); }
static float widen(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}
static uint16_t narrow(float value) { // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return isnan(value) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
int main(int count, char **words) {
    FILE *in = count == 3 ? fopen(words[1], "rb") : NULL, *out = in ? fopen(words[2], "wb") : NULL;
    if (!out || fread(&size, 8, 1, in) != 1) { fprintf(stderr, "norm INPUT OUTPUT\n"); return 1; }
    header = calloc(size + 1, 1);
    if (fread(header, 1, size, in) != size) return 1;
    data = malloc(1 << 28);
    size_t bytes = fread(data, 1, 1 << 28, in);
    char shape[80] = "", *start = strstr(strstr(header, "\"x\":{"), "\"shape\":[") + 8;
    memcpy(shape, start, strchr(start, ']') + 1 - start);
    size_t rows = 1, width = 0;
    for (char *at = shape; *at != ']';) { rows *= width ? width : 1; width = strtoull(at + 1, &at, 10); }
    uint16_t *x = values("x"), *weight = values("weight");
    double eps;
    memcpy(&eps, values("eps"), 8);
    char made[256];
    size = snprintf(made, sizeof made, "{\"y\":{\"dtype\":\"BF16\",\"shape\":%s,\"data_offsets\":[0,%zu]}}", shape, 2 * rows * width);
    fwrite(&size, 8, 1, out);
    fwrite(made, 1, size, out);
    for (size_t row = 0; row < rows && bytes; row++, x += width) {
        float sum = 0;
        for (size_t i = 0; i < width; i++) sum += widen(x[i]) * widen(x[i]);
        float rstd = 1 / sqrtf(sum / width + (float)eps);
        for (size_t i = 0; i < width; i++) {
            uint16_t y = narrow(widen(narrow(widen(x[i]) * rstd)) * widen(weight[i]));
            fwrite(&y, 2, 1, out);
        }
    }
    return fclose(out) != 0;
}
