//! From SQL text to a typed expression. What is not listed here is refused by name: a filter must never guess.

use sqlparser::ast::{BinaryOperator, CastKind, Expr, Ident, UnaryOperator, Value as Token};
use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::parser::Parser;
use sqlparser::tokenizer::Token as Lexeme;

use super::kind::{Type, collation_objection};
use super::like::Pattern;
use super::literal::{Literal, Refusal, beside, read_as};
use super::node::{Node, Operand, Operator};
use super::value::{Constant, Reading};
use crate::model::catalog::{CatalogColumn, CatalogTable, Generation};

/// Longest filter, in bytes.
const MAX_FILTER_BYTES: usize = 16 * 1024;
/// Deepest nesting, chains of AND and OR not counted.
const MAX_DEPTH: usize = 100;

/// A column of the filter, and whether SQL has to name the collation "C" when it compares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ColumnRef {
    pub(super) name: String,
    pub(super) collated: bool,
}

/// Types an expression against a table, of which only `columns` cross.
pub(super) fn parse(text: &str, table: &CatalogTable, columns: &[String]) -> Result<Node<ColumnRef>, Refusal> {
    if text.len() > MAX_FILTER_BYTES || text.contains('\0') {
        let what = format!("the row filter has more than {MAX_FILTER_BYTES} bytes or holds a zero byte");
        return Err((what, "shorten it".to_owned()));
    }
    let syntax = |error: &dyn std::fmt::Display| {
        (format!("the row filter is no SQL expression: {error}"), "correct the syntax".to_owned())
    };
    let dialect = PostgreSqlDialect {};
    let mut parser = Parser::new(&dialect).try_with_sql(text).map_err(|error| syntax(&error))?;
    let expression = parser.parse_expr().map_err(|error| syntax(&error))?;
    let rest = parser.peek_token();
    if rest.token != Lexeme::EOF {
        return Err(syntax(&format!("\"{}\" is not expected there", rest.token)));
    }
    if is_too_deep(&expression) {
        return Err(("the row filter is nested too deeply".to_owned(), "write it with fewer parentheses".to_owned()));
    }
    Typing { table, columns }.predicate(&expression)
}

/// What follows walks the expression by recursion, so its depth is bounded first, without recursion.
fn is_too_deep(expression: &Expr) -> bool {
    let mut open = vec![(expression, 0)];
    while let Some((expression, depth)) = open.pop() {
        if depth > MAX_DEPTH {
            return true;
        }
        match expression {
            Expr::BinaryOp { left, op: BinaryOperator::And | BinaryOperator::Or, right } => {
                open.extend([(left.as_ref(), depth), (right.as_ref(), depth + 1)]);
            }
            Expr::BinaryOp { left, right, .. }
            | Expr::IsDistinctFrom(left, right)
            | Expr::IsNotDistinctFrom(left, right)
            | Expr::Like { expr: left, pattern: right, .. } => {
                open.extend([(left.as_ref(), depth + 1), (right.as_ref(), depth + 1)]);
            }
            Expr::Between { expr, low, high, .. } => {
                open.extend([expr, low, high].map(|inner| (inner.as_ref(), depth + 1)));
            }
            Expr::InList { expr, list, .. } => {
                open.extend(std::iter::once(expr.as_ref()).chain(list).map(|inner| (inner, depth + 1)));
            }
            Expr::Nested(inner)
            | Expr::UnaryOp { expr: inner, .. }
            | Expr::Cast { expr: inner, .. }
            | Expr::Collate { expr: inner, .. }
            | Expr::AtTimeZone { timestamp: inner, .. }
            | Expr::IsNull(inner)
            | Expr::IsNotNull(inner)
            | Expr::IsTrue(inner)
            | Expr::IsNotTrue(inner)
            | Expr::IsFalse(inner)
            | Expr::IsNotFalse(inner)
            | Expr::IsUnknown(inner)
            | Expr::IsNotUnknown(inner) => open.push((inner.as_ref(), depth + 1)),
            // Anything else is refused, and named without what is inside.
            _ => {}
        }
    }
    false
}

/// One side of a comparison, as written.
enum Side<'a> {
    Column(&'a CatalogColumn),
    Constant(Literal),
}

/// Both sides of a comparison.
type Pair = (Operand<ColumnRef>, Operand<ColumnRef>);

struct Typing<'a> {
    table: &'a CatalogTable,
    columns: &'a [String],
}

impl<'a> Typing<'a> {
    fn predicate(&self, expression: &Expr) -> Result<Node<ColumnRef>, Refusal> {
        let boxed = |inner: &Expr| Ok::<_, Refusal>(Box::new(self.predicate(inner)?));
        let not = |negated: bool, node: Node<ColumnRef>| if negated { Node::Not(Box::new(node)) } else { node };
        Ok(match expression {
            Expr::Nested(inner) => self.predicate(inner)?,
            Expr::Identifier(name) => self.flag(name)?,
            Expr::Value(value) => match &value.value {
                Token::Boolean(truth) => Node::Known(Some(*truth)),
                Token::Null => Node::Known(None),
                _ => return Err(unsupported(expression)),
            },
            Expr::UnaryOp { op: UnaryOperator::Not, expr } => Node::Not(boxed(expr)?),
            Expr::BinaryOp { op: op @ (BinaryOperator::And | BinaryOperator::Or), .. } => {
                let parts =
                    spine(expression, op).into_iter().map(|part| self.predicate(part)).collect::<Result<_, _>>()?;
                if *op == BinaryOperator::And { Node::And(parts) } else { Node::Or(parts) }
            }
            Expr::BinaryOp { left, op, right } => match comparison(op) {
                Some(operator) => self.compare(left, operator, right)?,
                None => return Err(unsupported(expression)),
            },
            Expr::IsTrue(inner) => Node::Is(boxed(inner)?, true),
            Expr::IsFalse(inner) => Node::Is(boxed(inner)?, false),
            Expr::IsUnknown(inner) => Node::Unknown(boxed(inner)?),
            Expr::IsNotTrue(inner) => not(true, Node::Is(boxed(inner)?, true)),
            Expr::IsNotFalse(inner) => not(true, Node::Is(boxed(inner)?, false)),
            Expr::IsNotUnknown(inner) => not(true, Node::Unknown(boxed(inner)?)),
            Expr::IsNull(inner) => self.is_null(inner)?,
            Expr::IsNotNull(inner) => not(true, self.is_null(inner)?),
            Expr::IsDistinctFrom(left, right) => self.distinct(left, right)?,
            Expr::IsNotDistinctFrom(left, right) => not(true, self.distinct(left, right)?),
            Expr::Between { expr, negated, low, high } => {
                let low = self.compare(expr, Operator::GreaterEqual, low)?;
                not(*negated, Node::And(vec![low, self.compare(expr, Operator::LessEqual, high)?]))
            }
            Expr::InList { expr, list, negated } => not(*negated, self.is_among(expr, list)?),
            Expr::Like { negated, any: false, expr, pattern, escape_char } => {
                not(*negated, self.like(expr, pattern, escape_char.as_deref())?)
            }
            _ => return Err(unsupported(expression)),
        })
    }

    /// A boolean column that stands alone.
    fn flag(&self, name: &Ident) -> Result<Node<ColumnRef>, Refusal> {
        let column = self.column(name)?;
        if Type::of(column) != Some(Type::Bool) {
            let what =
                format!("column \"{}\" of type {} stands where a condition must stand", column.name, column.type_sql);
            return Err((what, "compare it with something".to_owned()));
        }
        Ok(Node::Flag(ColumnRef { name: column.name.clone(), collated: false }))
    }

    /// The column that a name means: folded to lower case unless quoted (manual, section 4.1.1), and one that crosses.
    fn column(&self, name: &Ident) -> Result<&'a CatalogColumn, Refusal> {
        let name = if name.quote_style.is_some() { name.value.clone() } else { name.value.to_ascii_lowercase() };
        let Some(column) = self.table.column(&name) else {
            let what = format!("the row filter names column \"{name}\", which the table does not have");
            return Err((what, "correct the row filter (unquoted names are in lower case)".to_owned()));
        };
        if column.generation == Generation::Computed {
            let what = format!("the row filter names column \"{name}\", which is computed and not in the log");
            return Err((what, "write its expression's columns instead".to_owned()));
        }
        if !self.columns.contains(&name) {
            let what = format!("the row filter names column \"{name}\", which the column list leaves out");
            return Err((what, "let the column cross, or filter by another one".to_owned()));
        }
        Ok(column)
    }

    fn typed(&self, column: &CatalogColumn, ordered: bool) -> Result<Type, Refusal> {
        let at = |why: &str| format!("column \"{}\" can't be compared exactly: {why}", column.name);
        let Some(kind) = Type::of(column) else {
            return Err((at(&format!("its type is {}", column.type_sql)), "filter by another column".to_owned()));
        };
        match collation_objection(column, ordered).filter(|_| kind.is_collated()) {
            Some(why) => Err((at(why), "compare with = or IN, or give the column COLLATE \"C\"".to_owned())),
            None => Ok(kind),
        }
    }

    fn side(&self, expression: &Expr) -> Result<Side<'a>, Refusal> {
        match expression {
            Expr::Nested(inner) => self.side(inner),
            Expr::Identifier(name) => Ok(Side::Column(self.column(name)?)),
            _ => Ok(Side::Constant(constant(expression)?)),
        }
    }

    fn compare(&self, left: &Expr, operator: Operator, right: &Expr) -> Result<Node<ColumnRef>, Refusal> {
        match self.operands(left, operator.orders(), right)? {
            Some((left, right)) => Ok(Node::Compare { left, operator, right }),
            None => Ok(Node::Known(None)),
        }
    }

    fn distinct(&self, left: &Expr, right: &Expr) -> Result<Node<ColumnRef>, Refusal> {
        if let Some((left, right)) = self.operands(left, false, right)? {
            return Ok(Node::Distinct { left, right });
        }
        // One side is NULL, so the other is a column.
        let column = if matches!(self.side(left)?, Side::Column(_)) { left } else { right };
        Ok(Node::Not(Box::new(self.is_null(column)?)))
    }

    /// Both sides, read alike; `None` when one of them is NULL.
    fn operands(&self, left: &Expr, ordered: bool, right: &Expr) -> Result<Option<Pair>, Refusal> {
        match (self.side(left)?, self.side(right)?) {
            (Side::Column(left), Side::Column(right)) => self.two_columns(left, ordered, right).map(Some),
            (Side::Column(column), Side::Constant(literal)) => self.with_constant(column, ordered, &literal),
            (Side::Constant(literal), Side::Column(column)) => {
                Ok(self.with_constant(column, ordered, &literal)?.map(|(column, constant)| (constant, column)))
            }
            (Side::Constant(_), Side::Constant(_)) => {
                let what = format!("\"{left}\" and \"{right}\" are both constants");
                Err((what, "compare a column, or write TRUE or FALSE".to_owned()))
            }
        }
    }

    fn with_constant(&self, column: &CatalogColumn, ordered: bool, literal: &Literal) -> Result<Option<Pair>, Refusal> {
        let kind = self.typed(column, ordered)?;
        if *literal == Literal::Null {
            return Ok(None);
        }
        let beside = beside(&kind, literal, false, ordered).map_err(|refusal| at_column(column, refusal))?;
        let column = Operand::Column(reference(column, &kind), beside.reading);
        Ok(Some((column, Operand::Constant(beside.constant, beside.sql))))
    }

    fn two_columns(&self, left: &CatalogColumn, ordered: bool, right: &CatalogColumn) -> Result<Pair, Refusal> {
        let (left_kind, right_kind) = (self.typed(left, ordered)?, self.typed(right, ordered)?);
        let exact = |kind: &Type| kind.is_integer() || *kind == Type::Numeric;
        let (left_reading, right_reading) = match (&left_kind, &right_kind) {
            (a, b) if a == b || (a.is_integer() && b.is_integer()) || (a.is_float() && b.is_float()) => {
                (a.reading(ordered), b.reading(ordered))
            }
            (a, b) if exact(a) && exact(b) => (Reading::Decimal, Reading::Decimal),
            (a, b) => {
                let what = format!(
                    "columns \"{}\" and \"{}\" are of different types, {} and {}",
                    left.name,
                    right.name,
                    a.sql(),
                    b.sql()
                );
                return Err((what, "compare columns of one type".to_owned()));
            }
        };
        if left_kind.is_collated() && left.collation != right.collation {
            let what = format!("columns \"{}\" and \"{}\" have different collations", left.name, right.name);
            return Err((what, "compare columns of one collation".to_owned()));
        }
        Ok((
            Operand::Column(reference(left, &left_kind), left_reading),
            Operand::Column(reference(right, &right_kind), right_reading),
        ))
    }

    fn is_among(&self, expression: &Expr, list: &[Expr]) -> Result<Node<ColumnRef>, Refusal> {
        let Side::Column(column) = self.side(expression)? else {
            return Err((format!("\"{expression}\" before IN is no column"), "write a column before IN".to_owned()));
        };
        let kind = self.typed(column, false)?;
        let mut literals = Vec::new();
        for item in list {
            match self.side(item)? {
                Side::Constant(literal) => literals.push(literal),
                Side::Column(_) => {
                    let what = format!("the column {item} stands in a list of constants");
                    return Err((what, "write OR in place of IN".to_owned()));
                }
            }
        }
        let listed = literals.len() > 1;
        let null = literals.contains(&Literal::Null);
        let constants = literals.iter().filter(|literal| **literal != Literal::Null);
        let typed: Vec<_> = constants
            .map(|literal| beside(&kind, literal, listed, false))
            .collect::<Result<_, _>>()
            .map_err(|refusal| at_column(column, refusal))?;
        // One member with decimals makes the whole list numeric.
        let decimal = typed.iter().any(|one| one.reading == Reading::Decimal);
        let reading = if decimal { Reading::Decimal } else { kind.reading(false) };
        let list = typed.into_iter().map(|one| match one.constant {
            Constant::Integer(value) if decimal => (Constant::Decimal(value.to_string()), one.sql),
            constant => (constant, one.sql),
        });
        Ok(Node::In { column: reference(column, &kind), reading, list: list.collect(), null })
    }

    fn like(&self, expression: &Expr, pattern: &Expr, escape: Option<&Expr>) -> Result<Node<ColumnRef>, Refusal> {
        let Side::Column(column) = self.side(expression)? else {
            return Err((
                format!("\"{expression}\" before LIKE is no column"),
                "write a column before LIKE".to_owned(),
            ));
        };
        let kind = self.typed(column, false)?;
        if !kind.is_collated() {
            let what = format!("LIKE on column \"{}\", whose type {} is no text", column.name, column.type_sql);
            return Err((what, "compare it with = or IN".to_owned()));
        }
        let text = |expression: &Expr| match constant(expression)? {
            Literal::Quoted(text) | Literal::Typed(Type::Text, text) => Ok(Some(text)),
            Literal::Null => Ok(None),
            Literal::Bool(_) | Literal::Number(_) | Literal::Typed(..) => {
                Err((format!("\"{expression}\" is no LIKE pattern"), "write the pattern in quotes".to_owned()))
            }
        };
        let escape = match escape.map(text).transpose()? {
            None => Some(Some('\\')),
            Some(None) => None,
            Some(Some(text)) => {
                let mut chars = text.chars();
                let escape = chars.next();
                if chars.next().is_some() {
                    return Err((
                        format!("ESCAPE '{text}' has more than one character"),
                        "name one character".to_owned(),
                    ));
                }
                Some(escape)
            }
        };
        let (Some(pattern), Some(escape)) = (text(pattern)?, escape) else { return Ok(Node::Known(None)) };
        let Some(compiled) = Pattern::new(&pattern, escape) else {
            return Err((format!("the pattern '{pattern}' ends with its escape character"), "double it".to_owned()));
        };
        Ok(Node::Like { column: reference(column, &kind), pattern: compiled })
    }

    fn is_null(&self, expression: &Expr) -> Result<Node<ColumnRef>, Refusal> {
        match expression {
            Expr::Nested(inner) => self.is_null(inner),
            Expr::Identifier(name) => {
                let column = self.column(name)?;
                // A row value is NULL when all its fields are. No table has a domain over a catalog's row type.
                let base_is_row =
                    column.base_type_oid >= 10_000 && Type::of(column).is_none() && column.enum_labels.is_empty();
                let may_be_row = column.type_kind == b'c' || (column.type_kind == b'd' && base_is_row);
                if may_be_row {
                    let what = format!(
                        "IS NULL on column \"{}\" of type {}, which may be a row type",
                        column.name, column.type_sql
                    );
                    return Err((what, "filter by another column".to_owned()));
                }
                Ok(Node::IsNull(ColumnRef { name: column.name.clone(), collated: false }))
            }
            _ => Ok(Node::Unknown(Box::new(self.predicate(expression)?))),
        }
    }
}

/// The parts of a chain of AND or OR. Chains lean to the left; walking them in a loop keeps the stack small.
fn spine<'e>(expression: &'e Expr, operator: &BinaryOperator) -> Vec<&'e Expr> {
    let (mut parts, mut rest) = (Vec::new(), expression);
    while let Expr::BinaryOp { left, op, right } = rest {
        if op != operator {
            break;
        }
        parts.push(right.as_ref());
        rest = left;
    }
    parts.push(rest);
    parts.reverse();
    parts
}

fn comparison(operator: &BinaryOperator) -> Option<Operator> {
    Some(match operator {
        BinaryOperator::Eq => Operator::Equal,
        BinaryOperator::NotEq => Operator::NotEqual,
        BinaryOperator::Lt => Operator::Less,
        BinaryOperator::LtEq => Operator::LessEqual,
        BinaryOperator::Gt => Operator::Greater,
        BinaryOperator::GtEq => Operator::GreaterEqual,
        _ => return None,
    })
}

fn reference(column: &CatalogColumn, kind: &Type) -> ColumnRef {
    ColumnRef { name: column.name.clone(), collated: kind.is_collated() }
}

fn at_column(column: &CatalogColumn, (what, remedy): Refusal) -> Refusal {
    (format!("column \"{}\": {what}", column.name), remedy)
}

/// A constant: a literal, a signed number, or a cast of one of them.
fn constant(expression: &Expr) -> Result<Literal, Refusal> {
    match expression {
        Expr::Nested(inner) => constant(inner),
        Expr::Value(value) => match &value.value {
            Token::Null => Ok(Literal::Null),
            Token::Boolean(truth) => Ok(Literal::Bool(*truth)),
            Token::SingleQuotedString(text) => Ok(Literal::Quoted(text.clone())),
            Token::Number(text, false) => {
                read_as(&Type::Numeric, text)?;
                Ok(Literal::Number(text.clone()))
            }
            _ => Err(unsupported(expression)),
        },
        // Named as a whole, not by the column inside.
        Expr::UnaryOp { expr, .. } | Expr::Cast { expr, .. } if matches!(**expr, Expr::Identifier(_)) => {
            Err(unsupported(expression))
        }
        Expr::UnaryOp { op: op @ (UnaryOperator::Minus | UnaryOperator::Plus), expr } => match constant(expr)? {
            Literal::Number(text) if *op == UnaryOperator::Plus => Ok(Literal::Number(text)),
            Literal::Number(text) => match text.strip_prefix('-') {
                Some(positive) => Ok(Literal::Number(positive.to_owned())),
                None => Ok(Literal::Number(format!("-{text}"))),
            },
            Literal::Null | Literal::Bool(_) | Literal::Quoted(_) | Literal::Typed(..) => {
                let what = format!("the sign before {expr}, which is no plain number");
                Err((what, "put the sign into the quotes, as '-5'::smallint".to_owned()))
            }
        },
        Expr::Cast { kind: CastKind::Cast | CastKind::DoubleColon, expr, data_type, format: None } => {
            cast(constant(expr)?, data_type)
        }
        Expr::TypedString(typed) if !typed.uses_odbc_syntax => match &typed.value.value {
            Token::SingleQuotedString(text) => cast(Literal::Quoted(text.clone()), &typed.data_type),
            _ => Err(unsupported(expression)),
        },
        _ => Err(unsupported(expression)),
    }
}

fn cast(literal: Literal, data_type: &sqlparser::ast::DataType) -> Result<Literal, Refusal> {
    let Some(kind) = Type::named(data_type) else {
        let what = format!("a cast to {data_type}");
        return Err((what, "leave the cast out: a constant in quotes takes the column's type".to_owned()));
    };
    let number = kind.is_integer() || kind.is_float() || matches!(kind, Type::Numeric | Type::Oid);
    match literal {
        Literal::Null => Ok(Literal::Null),
        Literal::Bool(truth) if kind == Type::Bool => Ok(Literal::Bool(truth)),
        Literal::Quoted(text) => read_as(&kind, &text).map(|_| Literal::Typed(kind, text)),
        // Only casts that neither round nor fail.
        Literal::Number(text) if number => read_as(&kind, &text).map(|_| Literal::Typed(kind, text)),
        Literal::Bool(_) | Literal::Number(_) | Literal::Typed(..) => {
            let what = format!("a cast of that constant to {data_type}");
            Err((what, "write the constant in quotes".to_owned()))
        }
    }
}

/// Refuses a construct by name.
fn unsupported(expression: &Expr) -> Refusal {
    let name = match expression {
        Expr::Function(function) => format!("the function {}()", function.name),
        Expr::Subquery(_) | Expr::InSubquery { .. } | Expr::Exists { .. } => "a subquery".to_owned(),
        Expr::ILike { .. } => "ILIKE, which depends on the server's locale".to_owned(),
        Expr::Like { .. } => "LIKE ANY".to_owned(),
        Expr::SimilarTo { .. } => "SIMILAR TO".to_owned(),
        Expr::RLike { .. } => "a regular expression".to_owned(),
        Expr::AnyOp { .. } | Expr::AllOp { .. } => "ANY or ALL; write IN (…)".to_owned(),
        Expr::Case { .. } => "CASE".to_owned(),
        Expr::Collate { .. } => "COLLATE".to_owned(),
        Expr::AtTimeZone { .. } => "AT TIME ZONE".to_owned(),
        Expr::Extract { .. } => "the function extract()".to_owned(),
        Expr::Cast { .. } => "a cast of something that is no constant".to_owned(),
        Expr::Array(_) => "an array".to_owned(),
        Expr::Tuple(_) => "a row value".to_owned(),
        Expr::Interval(_) => "an interval".to_owned(),
        Expr::CompoundIdentifier(_) => format!("the qualified name {expression}; write the column alone"),
        Expr::BinaryOp { op, .. } => match comparison(op) {
            Some(_) => format!("\"{expression}\" as a side of a comparison; write IS TRUE, AND or OR"),
            None => format!("the operator {op}"),
        },
        Expr::UnaryOp { op, .. } => format!("the operator {op}"),
        Expr::Value(value) => format!("\"{value}\""),
        Expr::Identifier(name) => format!("\"{name}\""),
        _ => "a construct that docs/RULES.md does not list".to_owned(),
    };
    let what = format!("the row filter uses {name}, which can't be evaluated exactly outside of PostgreSQL");
    (what, "rewrite it with what docs/RULES.md lists".to_owned())
}
