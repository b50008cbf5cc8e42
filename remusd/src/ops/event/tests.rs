use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;

use super::log::KEPT;
use super::*;

fn domain(name: &str) -> DomainRef {
    DomainRef { domid: Some(DomId(3)), name: name.into(), uuid: ProtectionId::nil() }
}

fn seq(delivery: Option<Delivery>) -> u64 {
    match delivery {
        Some(Delivery::Event(event)) => event.seq,
        other => panic!("{other:?}"),
    }
}

fn of(name: &str) -> Filter {
    Filter { domain: Some(name.into()), ..Filter::default() }
}

#[test]
fn history_and_live_join_without_gap() {
    let log = EventLog::default();
    log.publish(domain("g"), EventKind::Protecting, "a");
    let (past, mut live) = log.subscribe();
    log.publish(domain("g"), EventKind::Protected, "b");
    assert_eq!(past.iter().map(|e| e.seq).collect::<Vec<_>>(), [1]);
    assert_eq!(seq(live.try_next()), 2);
    assert_eq!(live.try_next(), None);
}

#[test]
fn a_slow_subscriber_learns_how_much_it_missed_before_it_gets_more() {
    let log = EventLog::default();
    let (_, mut live) = log.subscribe();
    for _ in 0..KEPT + 5 {
        log.publish(domain("g"), EventKind::Protected, "x");
    }
    assert_eq!(live.try_next(), Some(Delivery::Missed(5)));
    assert_eq!(seq(live.try_next()), 6);
}

#[test]
fn a_flood_of_one_domain_costs_a_subscriber_of_another_nothing() {
    let log = EventLog::default();
    let (_, mut live) = log.subscribe_to(of("quiet"));
    log.publish(domain("quiet"), EventKind::Protected, "x");
    for _ in 0..2 * KEPT {
        log.publish(domain("loud"), EventKind::EpochSlow, "x");
    }
    assert_eq!(seq(live.try_next()), 1);
    assert_eq!(live.try_next(), None);
}

#[test]
fn filters_know_domain_kind_and_number() {
    let log = EventLog::default();
    for (name, kind) in [("a", EventKind::Protected), ("b", EventKind::Protected), ("a", EventKind::Unprotected)] {
        log.publish(domain(name), kind, "x");
    }
    let seqs = |filter: Filter| log.kept(&filter).iter().map(|e| e.seq).collect::<Vec<_>>();
    assert_eq!(seqs(of("a")), [1, 3]);
    assert_eq!(seqs(of("3")), [1, 2, 3], "the domain id");
    assert_eq!(seqs(Filter { kinds: vec![EventKind::Protected], ..of("a") }), [1]);
    assert_eq!(seqs(Filter { after: 2, ..Filter::default() }), [3]);
}

#[tokio::test]
async fn a_callback_may_subscribe_publish_and_unsubscribe_from_inside_a_delivery() {
    let log = Arc::new(EventLog::default());
    let (seen, mut heard) = mpsc::unbounded_channel();
    let (inner_log, inner_seen) = (log.clone(), seen);
    log.call(Filter::default(), move |delivery, me| {
        let Delivery::Event(event) = delivery else { panic!() };
        let late = inner_seen.clone();
        inner_log.call(Filter::default(), move |delivery, _| late.send(("late", delivery)).unwrap());
        inner_log.publish(domain("g"), EventKind::Degraded, "from inside");
        inner_seen.send(("first", Delivery::Event(event))).unwrap();
        me.now();
    });
    log.publish(domain("g"), EventKind::Protected, "x");
    let mut got = Vec::new();
    for _ in 0..2 {
        let (who, delivery) = heard.recv().await.unwrap();
        got.push((who, seq(Some(delivery))));
    }
    got.sort_unstable();
    assert_eq!(got, [("first", 1), ("late", 2)], "the first hears nothing after it has unsubscribed itself");
    assert_eq!(log.subscribers(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unsubscribing_from_elsewhere_lets_the_delivery_under_way_end_and_starts_no_other() {
    let log = Arc::new(EventLog::default());
    let count = Arc::new(AtomicU64::new(0));
    let (entered_send, mut entered) = mpsc::unbounded_channel();
    let (go_send, go) = std::sync::mpsc::channel::<()>();
    let counted = count.clone();
    let unsubscribe = log.call(Filter::default(), move |_, _| {
        entered_send.send(()).unwrap();
        go.recv().unwrap();
        counted.fetch_add(1, Ordering::SeqCst);
    });
    log.publish(domain("g"), EventKind::Protected, "under way");
    log.publish(domain("g"), EventKind::Protected, "queued");
    entered.recv().await.unwrap();
    unsubscribe.now();
    log.publish(domain("g"), EventKind::Protected, "new");
    go_send.send(()).unwrap();
    // Its end drops the callback and with it this sender.
    assert_eq!(entered.recv().await, None);
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_callback_that_hangs_or_panics_holds_up_neither_the_log_nor_the_others() {
    let log = EventLog::default();
    log.call(Filter::default(), |_, _| panic!("a subscriber's bug"));
    let (_, mut live) = log.subscribe();
    for n in 1..=3 {
        log.publish(domain("g"), EventKind::Protected, "x");
        assert_eq!(seq(live.next().await), n);
    }
    tokio::task::yield_now().await;
    log.publish(domain("g"), EventKind::Protected, "x");
    assert_eq!(log.subscribers(), 1);
}

/// Publishers on many threads: every subscriber sees every event once, in the same order, and each domain's in its own.
#[test]
fn order_is_kept_for_each_domain_under_concurrent_publishers() {
    let log = Arc::new(EventLog::default());
    let (_, mut live) = log.subscribe();
    std::thread::scope(|scope| {
        for name in ["a", "b", "c"] {
            let log = log.clone();
            scope.spawn(move || {
                for n in 0..200 {
                    log.publish(domain(name), EventKind::FirstCopyProgress, n.to_string());
                }
            });
        }
    });
    let (mut last, mut next) = (0, std::collections::HashMap::new());
    while let Some(Delivery::Event(event)) = live.try_next() {
        assert_eq!(event.seq, last + 1);
        last = event.seq;
        let expected = next.entry(event.domain.name.clone()).or_insert(0);
        assert_eq!(event.detail, expected.to_string(), "{}", event.domain.name);
        *expected += 1;
    }
    assert_eq!(last, 600);
}

#[test]
fn kinds_are_known_by_name() {
    for kind in EventKind::ALL {
        assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        assert_eq!(kind.name().replace('_', "-").parse(), Ok(*kind));
    }
    assert!("nonsense".parse::<EventKind>().unwrap_err().contains("unprotected"));
}
