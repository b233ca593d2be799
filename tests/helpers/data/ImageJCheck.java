// Opens label image and ROI zip as ImageJ does, erases three cells in each, saves both, and draws one region of each type.
// java -Djava.awt.headless=true -cp ij.jar ImageJCheck.java labels.tif rois.zip erased.tif erased.zip types.zip types.tif

import ij.ImagePlus;
import ij.gui.*;
import ij.io.*;
import ij.process.*;
import java.io.*;
import java.util.*;
import java.util.zip.*;

public class ImageJCheck {
    static void put(ZipOutputStream zip, String name, Roi roi) throws IOException {
        ByteArrayOutputStream bytes = new ByteArrayOutputStream();
        new RoiEncoder(bytes).write(roi);
        zip.putNextEntry(new ZipEntry(name));
        zip.write(bytes.toByteArray());
        zip.closeEntry();
    }

    public static void main(String[] files) throws Exception {
        ImagePlus image = new Opener().openImage(files[0]);
        ImageProcessor labels = image.getProcessor();
        Set<Integer> erased = new TreeSet<>();
        for (int y = 0; y < labels.getHeight(); y++)
            for (int x = 0; x < labels.getWidth(); x++) {
                int label = labels.get(x, y);
                if (label > 0 && (erased.contains(label) || erased.size() < 3)) {
                    erased.add(label);
                    labels.set(x, y, 0);
                }
            }
        new FileSaver(image).saveAsTiff(files[2]);

        long pixels = 0;
        int number = 0;
        try (ZipInputStream in = new ZipInputStream(new FileInputStream(files[1]));
                ZipOutputStream out = new ZipOutputStream(new FileOutputStream(files[3]))) {
            for (ZipEntry entry; (entry = in.getNextEntry()) != null;) {
                Roi roi = new RoiDecoder(in.readAllBytes(), entry.getName()).getRoi();
                ImageProcessor blank = new ByteProcessor(image.getWidth(), image.getHeight());
                blank.setRoi(roi);
                pixels += blank.getStatistics().pixelCount;
                if (++number > 3) put(out, entry.getName(), roi);
            }
        }
        System.out.println("pixels " + pixels);

        ShapeRoi ring = new ShapeRoi(new OvalRoi(200, 20, 60, 60)).xor(new ShapeRoi(new OvalRoi(215, 35, 20, 20)));
        Roi[] types = {
            new OvalRoi(10, 20, 41, 33), new Roi(70, 20, 30, 25), new EllipseRoi(120, 20, 170, 60, 0.5), ring,
            new PolygonRoi(new float[] {20.5f, 60.2f, 45.7f}, new float[] {80.1f, 90f, 130.6f}, Roi.POLYGON),
            new RotatedRectRoi(120, 90, 170, 120, 20),
            new PolygonRoi(new int[] {200, 240, 230, 205}, new int[] {100, 105, 140, 130}, 4, Roi.FREEROI),
        };
        ByteProcessor drawn = new ByteProcessor(300, 200);
        try (ZipOutputStream out = new ZipOutputStream(new FileOutputStream(files[4]))) {
            for (int i = 0; i < types.length; i++) {
                put(out, "type" + i + ".roi", types[i]);
                drawn.setValue(i + 1);
                drawn.fill(types[i]);
            }
        }
        new FileSaver(new ImagePlus("types", drawn)).saveAsTiff(files[5]);
    }
}
