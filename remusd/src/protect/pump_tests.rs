//! The pump with a capture that a test plays, towards nowhere.

use bytes::Bytes;

use super::*;
use crate::capture::played;
use crate::protect::peers::blackhole::Blackhole;
use crate::stream::PageBatch;

const SOON: Duration = Duration::from_secs(60);

#[tokio::test]
async fn an_epoch_is_counted_and_timed_from_its_first_item_and_not_from_the_order() {
    let (push, items) = played();
    let (orders_send, orders) = mpsc::channel(4);
    let (events, mut done) = mpsc::unbounded_channel();
    let (sent, progress) = watch::channel(Sent::default());
    let held = Arc::default();
    tokio::spawn(Pump { items, outlet: Box::new(Blackhole), orders, events, sent, held }.run());
    push(CaptureItem::Preamble(Bytes::from_static(b"preamble")));
    for epoch in [Epoch(0), Epoch(1)] {
        orders_send.send(PumpOrder::Begin { epoch, armed: false, audited: BTreeSet::new() }).await.unwrap();
        // The pump waits for the first item meanwhile.
        tokio::task::yield_now().await;
        let captured = Instant::now();
        push(CaptureItem::Pages(PageBatch { entries: vec![1, 2], data: Bytes::from(vec![7; 2 * PAGE_SIZE]) }));
        push(CaptureItem::EndOfEpoch);
        tokio::time::timeout(SOON, progress.clone().wait_for(|sent| sent.pages == 2 * (epoch.0 + 1)))
            .await
            .unwrap()
            .unwrap();
        let resumed = Instant::now();
        orders_send.send(PumpOrder::Finish { records: vec![], audit: None }).await.unwrap();
        let event = tokio::time::timeout(SOON, done.recv()).await.unwrap().unwrap();
        let PumpEvent::Sent { epoch: which, cost } = event else { panic!("{event:?}") };
        assert_eq!((which, cost.pages), (epoch, 2));
        let began = cost.began.unwrap();
        assert!(captured <= began && began <= resumed, "while it was captured");
    }
}
