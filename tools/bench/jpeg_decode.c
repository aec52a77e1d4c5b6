/* JPEG to RGB by libjpeg-turbo for bench_region.py: a whole image, or a region by libjpeg-turbo's own partial decoding.
 * One decoder, reused by all calls; not thread-safe. Exact settings: slow integer DCT, interpolated chroma. */
#include <setjmp.h>
#include <stddef.h>
#include <stdio.h>
#include <jpeglib.h>

static struct jpeg_decompress_struct decoder;
static struct jpeg_error_mgr errors;
static jmp_buf failed;
static char reason[JMSG_LENGTH_MAX];
static int ready;

static void fail(j_common_ptr any) {
    any->err->format_message(any, reason);
    longjmp(failed, 1);
}

static void ignore(j_common_ptr any) { (void)any; } /* prints no warnings */

#define TEXT(name) #name
#define VALUE_TEXT(name) TEXT(name)
const char *version(void) { return VALUE_TEXT(LIBJPEG_TURBO_VERSION); }
const char *why(void) { return reason; }

/* Widen columns [*left, *right) by the margin that exact pixels need: chroma interpolation of 2:1 uses the neighbouring pixel's
 * sample. Rows need no margin: jpeg_skip_scanlines keeps the context rows itself. */
static void widen(JDIMENSION *left, JDIMENSION *right) {
    if (decoder.max_h_samp_factor > 1) {
        *left -= *left > 0;
        *right += *right < decoder.output_width;
    }
}

/* region: top, left, bottom, right in pixels, or NULL for the whole image; it must lie within the image.
 * out: receives rows of RGB without gaps. place: receives top, left, height, width of the decoded part, which contains the
 * region. Returns 0, or -1 if libjpeg-turbo fails or the `size` bytes of `out` are too few; `why` returns the reason. */
int decode(const unsigned char *data, size_t bytes, const long *region, unsigned char *out, size_t size, long *place) {
    if (!ready) {
        decoder.err = jpeg_std_error(&errors);
        errors.error_exit = fail;
        errors.output_message = ignore;
    }
    if (setjmp(failed)) {
        if (ready) jpeg_abort_decompress(&decoder);
        return -1;
    }
    if (!ready) jpeg_create_decompress(&decoder);
    ready = 1;
    jpeg_mem_src(&decoder, data, bytes);
    jpeg_read_header(&decoder, TRUE);
    decoder.out_color_space = JCS_RGB;
    decoder.dct_method = JDCT_ISLOW;
    decoder.do_fancy_upsampling = TRUE;
    jpeg_start_decompress(&decoder);
    JDIMENSION top = 0, left = 0, bottom = decoder.output_height, width = decoder.output_width;
    if (region) {
        JDIMENSION right = region[3];
        top = region[0], left = region[1], bottom = region[2];
        widen(&left, &right);
        width = right - left;
        jpeg_crop_scanline(&decoder, &left, &width); /* moves left to a border between MCUs */
        if (top > 0) jpeg_skip_scanlines(&decoder, top);
    }
    size_t stride = 3 * (size_t)width;
    place[0] = top, place[1] = left, place[2] = bottom - top, place[3] = width;
    if (stride * place[2] > size) {
        jpeg_abort_decompress(&decoder);
        snprintf(reason, sizeof reason, "the image is larger than the output");
        return -1;
    }
    while (decoder.output_scanline < bottom) {
        JSAMPROW rows[16];
        JDIMENSION count = bottom - decoder.output_scanline;
        if (count > 16) count = 16;
        for (JDIMENSION i = 0; i < count; i++) rows[i] = out + (decoder.output_scanline - top + i) * stride;
        jpeg_read_scanlines(&decoder, rows, count);
    }
    if (region) jpeg_abort_decompress(&decoder); /* the rows below are not needed */
    else jpeg_finish_decompress(&decoder);
    return 0;
}
