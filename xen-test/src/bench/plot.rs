//! The rows as pictures: SVG, for the documentation.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;

use super::measure::Row;
use super::subject::{Subject, Way};
use super::{Load, Report};

const WIDTH: u32 = 900;
const HEIGHT: u32 = 420;

/// Bars of a picture, in this order and colour: those of the people who look at it may be blind to red or green.
const BARS: [(Subject, RGBColor); 3] = [
    (Subject::Stock, RGBColor(0xbb, 0xbb, 0xbb)),
    (Subject::SaveHelper, RGBColor(0x77, 0xaa, 0xdd)),
    (Subject::Native, RGBColor(0x22, 0x44, 0x88)),
];

/// What a picture shows of a row: the bar's height, and the end of the line above it.
type Figure = fn(&Row) -> Option<(f64, f64)>;

/// Writes a picture for everything that the report has rows for; returns the files' names.
///
/// # Errors
/// A file cannot be written.
pub fn plots(report: &Report, dir: &Path) -> Result<Vec<String>> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let stall: Figure = |row| Some((row.epochs.stall_p50_ms, row.epochs.stall_p99_ms));
    let wire: Figure = |row| row.wire_bytes_per_epoch.map(|bytes| (bytes / 1048576.0, bytes / 1048576.0));
    let mut made = Vec::new();
    for (name, title, way, figure) in [
        (
            "stall-local.svg",
            "Stall of the guest per checkpoint into nothing: median, line to the 99th percentile, ms",
            Way::Blackhole,
            stall,
        ),
        (
            "stall-ssh.svg",
            "Stall of the guest per checkpoint to another host: median, line to the 99th percentile, ms",
            Way::Ssh,
            stall,
        ),
        ("wire.svg", "Bytes to the other host per checkpoint, MiB", Way::Ssh, wire),
    ] {
        let rows: Vec<&Row> = report.rows.iter().filter(|row| row.way == way).collect();
        if rows.iter().any(|row| figure(row).is_some()) {
            let file = dir.join(name);
            let root = SVGBackend::new(&file, (WIDTH, HEIGHT)).into_drawing_area();
            bars(&root, title, &rows, figure).map_err(|e| anyhow::anyhow!("cannot draw {}: {e}", file.display()))?;
            made.push(name.to_owned());
        }
    }
    Ok(made)
}

/// Loads in the order in which they were measured.
fn loads(rows: &[&Row]) -> Vec<Load> {
    let mut loads: Vec<Load> = Vec::new();
    for row in rows {
        if !loads.contains(&row.load) {
            loads.push(row.load);
        }
    }
    loads
}

fn bars<'a, B: DrawingBackend + 'a>(
    root: &DrawingArea<B, plotters::coord::Shift>,
    title: &str,
    rows: &[&Row],
    figure: Figure,
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>>
where
    B::ErrorType: 'static,
{
    let loads = loads(rows);
    let top = rows.iter().filter_map(|row| figure(row)).fold(1.0, |top: f64, (bar, line)| top.max(bar).max(line));
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(root)
        .caption(title, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(34)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..loads.len() as f64, 0.0..top * 1.1)?;
    let name = |x: &f64| {
        let load = loads.get(*x as usize).filter(|_| (x.fract() - 0.5).abs() < 1e-6);
        load.map_or(String::new(), |load| match load.pages_per_epoch {
            0 => "idle".into(),
            pages => format!("{pages} × {} B {:?}", load.bytes_per_page, load.order),
        })
    };
    // Two for each load, of which the one in the middle of it is named.
    chart.configure_mesh().disable_x_mesh().x_labels(2 * loads.len() + 1).x_label_formatter(&name).draw()?;
    let width = 0.8 / BARS.len() as f64;
    for (n, (subject, colour)) in BARS.into_iter().enumerate() {
        let of_subject = rows.iter().filter(|row| row.subject == subject);
        let shapes: Vec<(f64, f64, f64)> = of_subject
            .filter_map(|row| {
                let at = loads.iter().position(|load| *load == row.load)? as f64 + 0.1 + width * n as f64;
                figure(row).map(|(bar, line)| (at, bar, line))
            })
            .collect();
        chart
            .draw_series(
                shapes.iter().map(|(x, bar, _)| Rectangle::new([(*x, 0.0), (x + width * 0.9, *bar)], colour.filled())),
            )?
            .label(subject.name())
            .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 12, y + 4)], colour.filled()));
        chart.draw_series(
            shapes
                .iter()
                .map(|(x, bar, line)| PathElement::new([(x + width * 0.45, *bar), (x + width * 0.45, *line)], BLACK)),
        )?;
    }
    chart
        .configure_series_labels()
        .background_style(WHITE)
        .border_style(BLACK)
        .position(SeriesLabelPosition::UpperLeft)
        .draw()?;
    root.present()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::goals;
    use crate::bench::measure::{Epochs, example};

    #[test]
    fn a_picture_has_a_bar_for_each_row_and_none_is_drawn_without_rows() {
        let dir = tempfile::tempdir().unwrap();
        let row = |subject, stall_p50_ms| Row {
            subject,
            epochs: Epochs { count: 9, stall_p50_ms, stall_p99_ms: stall_p50_ms * 2.0, ..Epochs::default() },
            ..example()
        };
        let rows = vec![row(Subject::Stock, 100.0), row(Subject::Native, 30.0)];
        let report = Report { goals: goals(&rows), rows, incomplete: None };
        assert_eq!(plots(&report, dir.path()).unwrap(), ["stall-local.svg"]);
        let svg = std::fs::read_to_string(dir.path().join("stall-local.svg")).unwrap();
        let coloured = |colour: &str| svg.matches(colour).count();
        // One in the chart, one in the legend.
        assert_eq!((coloured("#BBBBBB"), coloured("#224488")), (2, 2), "{svg}");
        assert!(svg.contains("4000 × 16 B"), "{svg}");
    }
}
