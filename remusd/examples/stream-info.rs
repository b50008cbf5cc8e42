//! Developer tool: what a stream of `xl migrate`, `xl remus` or `xl save` holds; and a small real stream cut out of a big one, for tests.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use bytes::Bytes;
use clap::Parser;
use remusd::stream::{CaptureItem, Chunked, PageBatch, RemusComposer, SessionEvent, SessionParser};

#[derive(Parser)]
struct Arguments {
    /// The stream
    file: PathBuf,
    /// Write the stream's first epochs, with only their smallest page batches, to this file
    #[arg(long)]
    cut: Option<PathBuf>,
    /// How many epochs to cut out
    #[arg(long, default_value_t = 2)]
    epochs: u64,
    /// Greatest batch that is kept, bytes
    #[arg(long, default_value_t = 20_000)]
    batch: usize,
}

#[derive(Default)]
struct Summary {
    pages: u64,
    data_pages: u64,
    batches: u64,
    smallest: Option<usize>,
    states: BTreeMap<(u32, u32), usize>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut file = File::open(&arguments.file).with_context(|| arguments.file.display().to_string())?;
    let mut parser = Chunked::new(SessionParser::new());
    let mut events = Vec::new();
    let mut pieces = Pieces::default();
    let (mut epoch, mut summary) = (0, Summary::default());
    loop {
        let mut chunk = Vec::with_capacity(1 << 20);
        if Read::by_ref(&mut file).take(1 << 20).read_to_end(&mut chunk)? == 0 {
            break;
        }
        parser.feed(Bytes::from(chunk), &mut events)?;
        for event in events.drain(..) {
            if epoch < arguments.epochs {
                pieces.keep(&event, arguments.batch)?;
            }
            match event {
                SessionEvent::Config(config) => println!("configuration: {} bytes", config.len()),
                SessionEvent::Item(CaptureItem::Preamble(bytes)) => println!("preamble: {} bytes", bytes.len()),
                SessionEvent::Item(CaptureItem::Pages(batch)) => {
                    summary.pages += batch.entries.len() as u64;
                    summary.data_pages += batch.data_pages() as u64;
                    summary.batches += 1;
                    if batch.data_pages() > 0 {
                        summary.smallest = Some(summary.smallest.map_or(batch.size(), |least| least.min(batch.size())));
                    }
                }
                SessionEvent::Item(CaptureItem::State(record)) => {
                    summary.states.insert((record.layer as u32, record.kind), record.body.len());
                }
                SessionEvent::Item(CaptureItem::EndOfEpoch) | SessionEvent::End => {
                    println!(
                        "epoch {epoch}: {} entries, {} pages in {} batches (smallest with contents {:?} bytes), state (layer, kind): bytes {:?}",
                        summary.pages, summary.data_pages, summary.batches, summary.smallest, summary.states
                    );
                    summary = Summary::default();
                    epoch += 1;
                }
            }
        }
    }
    println!("end: {}", parser.finish().map_or_else(|error| error.to_string(), |()| "whole".into()));
    if let Some(path) = arguments.cut {
        File::create(path)?.write_all(&pieces.bytes)?;
    }
    Ok(())
}

/// Collects the small stream.
#[derive(Default)]
struct Pieces {
    bytes: Vec<u8>,
    config: String,
    state: Vec<remusd::stream::Record>,
    empty_batches: u32,
}

impl Pieces {
    fn keep(&mut self, event: &SessionEvent, most: usize) -> Result<()> {
        match event {
            SessionEvent::Config(config) => self.config.clone_from(config),
            SessionEvent::Item(CaptureItem::Preamble(preamble)) => {
                self.put(&RemusComposer::head(&self.config, preamble)?);
            }
            SessionEvent::Item(CaptureItem::Pages(batch)) if self.wants(batch, most) => {
                self.put(&RemusComposer::pages(batch)?);
            }
            SessionEvent::Item(CaptureItem::State(record)) => self.state.push(record.clone()),
            SessionEvent::Item(CaptureItem::EndOfEpoch) => {
                let state = std::mem::take(&mut self.state);
                self.put(&[RemusComposer::end_of_epoch(&state)]);
            }
            SessionEvent::Item(CaptureItem::Pages(_)) | SessionEvent::End => {}
        }
        Ok(())
    }

    /// One batch without contents is enough.
    fn wants(&mut self, batch: &PageBatch, most: usize) -> bool {
        if batch.data_pages() == 0 {
            self.empty_batches += 1;
            return self.empty_batches == 1;
        }
        batch.size() <= most
    }

    fn put(&mut self, pieces: &[Bytes]) {
        for piece in pieces {
            self.bytes.extend_from_slice(piece);
        }
    }
}
